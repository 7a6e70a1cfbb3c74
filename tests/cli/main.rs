//! The binary as a user meets it: what it prints, writes, refuses and returns.

#[cfg(not(any(feature = "cuda", feature = "emulate")))]
mod backends;
mod bad_files;
mod bad_flags;
mod cache_state;
mod chat;
mod check;
mod doctor;
mod exports;
mod help;
mod outputs;
mod plan;
mod plan_families;
mod program;
mod resume;
mod round;
mod run;
mod settings;
#[cfg(unix)]
mod terminal;
