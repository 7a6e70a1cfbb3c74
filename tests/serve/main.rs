//! `moectl serve` by a client of its own, over loopback: the built-in model, and scripts where answers
//! must be known.

mod apis;
mod attacks;
mod bench_endpoint;
mod client;
mod fuzz;
mod generation;
mod manners;
mod prefix;
mod privacy;
mod sessions;
mod soak;
mod tools;
