#![no_main]

moectl_fuzz::target!("cache_state");
