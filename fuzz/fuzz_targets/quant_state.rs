#![no_main]

moectl_fuzz::target!("quant_state");
