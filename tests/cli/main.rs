//! The binary as a user meets it: what it prints, writes, refuses and returns.

#[cfg(not(any(feature = "cuda", feature = "emulate")))]
mod backends;
mod bad_files;
mod bad_flags;
mod cache_state;
mod chat;
mod doctor;
mod exports;
mod help;
mod outputs;
mod plan;
mod program;
mod resume;
mod round;
mod run;
mod settings;
#[cfg(unix)]
mod terminal;
