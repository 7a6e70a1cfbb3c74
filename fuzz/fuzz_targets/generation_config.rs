#![no_main]

moectl_fuzz::target!("generation_config");
