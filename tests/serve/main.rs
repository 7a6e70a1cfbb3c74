//! `moectl serve` by a client of its own, over loopback: the built-in model, and scripts where answers
//! must be known.

mod apis;
mod attacks;
mod client;
mod generation;
mod manners;
mod sessions;
mod tools;
