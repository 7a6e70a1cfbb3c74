//! Writing NF4, byte for byte as bitsandbytes 0.50.2 does on the CPU.
