//! Tells the program what built it, for its records.

use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let rustc = std::env::var("RUSTC").unwrap_or("rustc".into());
    let version = Command::new(rustc).arg("--version").output().ok();
    let version = version
        .and_then(|out| String::from_utf8(out.stdout).ok())
        .unwrap_or_default();
    let version = version.split_whitespace().nth(1).unwrap_or("unknown");
    println!("cargo::rustc-env=MOECTL_RUSTC={version}");
    let target = std::env::var("TARGET").unwrap_or("unknown".into());
    println!("cargo::rustc-env=MOECTL_TARGET={target}");
}
