#![no_main]

moectl_fuzz::target!("config");
