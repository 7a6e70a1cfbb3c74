#![no_main]

moectl_fuzz::target!("placement");
