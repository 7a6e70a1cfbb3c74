//! Fuzz targets of every parser that reads somebody's file; the parsers are in `tests/parsers`.

#[path = "../tests/parsers/targets.rs"]
pub mod targets;

pub use libfuzzer_sys;

/// A fuzz target that gives its bytes to the parser of that name.
#[macro_export]
macro_rules! target {
    ($name:literal) => {
        $crate::libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
            static PARSER: std::sync::LazyLock<$crate::targets::Parser> =
                std::sync::LazyLock::new(|| $crate::targets::parser($name));
            PARSER(bytes);
        });
    };
}
