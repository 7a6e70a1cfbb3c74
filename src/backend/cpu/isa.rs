//! Which vector instructions this machine has, as proofs that kernels can demand.
//!
//! A token exists only where its features were seen, so a function that takes one may use them.
//! `dispatch!` compiles a kernel body once per instruction set.

use crate::backend::{BackendError, Result};
#[cfg(target_arch = "x86_64")]
use crate::hardware::cpu;

/// Proof of AMX tiles with bytes, granted to this process, and of all that [`Avx512`] proves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Amx(Avx512);

impl Amx {
    pub fn avx512(self) -> Avx512 {
        self.0
    }

    /// For tests that stand in for the missing instructions.
    ///
    /// # Safety
    /// Something must execute AMX instructions on this machine.
    #[cfg(all(test, target_arch = "x86_64", target_os = "linux"))]
    pub(super) unsafe fn assume(avx512: Avx512) -> Amx {
        Amx(avx512)
    }
}

/// Proof of AVX-512 F, BW, VL, DQ and VNNI, and of all that [`Avx2`] proves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx512(());

/// Proof of AVX-VNNI, and of all that [`Avx2`] proves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AvxVnni(Avx2);

impl AvxVnni {
    pub fn avx2(self) -> Avx2 {
        self.0
    }
}

/// Proof of AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx2(());

/// Needs no proof: plain Rust.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scalar;

/// The instruction set that kernels run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    Scalar(Scalar),
    Avx2(Avx2),
    /// [`Avx2`] but for integer products
    AvxVnni(AvxVnni),
    Avx512(Avx512),
    /// [`Avx512`] but for products of many tokens
    Amx(Amx),
}

/// Environment variable that forces an instruction set: `scalar`, `avx2`, `avxvnni`, `avx512` or
/// `amx`.
pub const ISA_VARIABLE: &str = "MOECTL_ISA";

impl Isa {
    /// All that this machine can run, slowest first.
    pub fn available() -> Vec<Isa> {
        let mut found = vec![Isa::Scalar(Scalar)];
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            if has!("avx2") && has!("fma") && has!("f16c") {
                found.push(Isa::Avx2(Avx2(())));
                if has!("avxvnni") {
                    found.push(Isa::AvxVnni(AvxVnni(Avx2(()))));
                }
                if has!("avx512f")
                    && has!("avx512bw")
                    && has!("avx512vl")
                    && has!("avx512dq")
                    && has!("avx512vnni")
                {
                    found.push(Isa::Avx512(Avx512(())));
                    if cpu::has_amx() {
                        found.push(Isa::Amx(Amx(Avx512(()))));
                    }
                }
            }
        }
        found
    }

    /// The best one, or the one that [`ISA_VARIABLE`] names.
    ///
    /// AMX only if named: its kernels have run on emulated instructions, not yet on a CPU with them.
    ///
    /// # Errors
    /// If the variable names one that this machine lacks.
    pub fn detect() -> Result<Isa> {
        match std::env::var(ISA_VARIABLE) {
            Ok(name) => Isa::named(&name),
            Err(_) => {
                let mut proven = Isa::available().into_iter();
                let best = proven.rfind(|isa| !matches!(isa, Isa::Amx(_)));
                Ok(best.expect("scalar is always there"))
            }
        }
    }

    /// The one called `name`.
    ///
    /// # Errors
    /// If this machine has none of that name; the message lists those it has.
    pub fn named(name: &str) -> Result<Isa> {
        let available = Isa::available();
        available
            .iter()
            .find(|isa| isa.name() == name)
            .copied()
            .ok_or_else(|| {
                let names: Vec<_> = available.iter().map(|isa| isa.name()).collect();
                BackendError::Other(format!(
                    "{ISA_VARIABLE} is `{name}`, this machine has {}",
                    names.join(", ")
                ))
            })
    }

    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar(_) => "scalar",
            Isa::Avx2(_) => "avx2",
            Isa::AvxVnni(_) => "avxvnni",
            Isa::Avx512(_) => "avx512",
            Isa::Amx(_) => "amx",
        }
    }
}

/// Defines `fn name(isa, args..)`, which runs `body(token, args..)` compiled for that `isa`.
///
/// `body` is generic over [`Simd`](super::simd::Simd) and `#[inline(always)]`, so that it takes on
/// the target features of the function it is inlined into. Integer products make AVX-VNNI differ from AVX2: a
/// body that has some says so by `, products` at its end, the others are not compiled for it.
macro_rules! dispatch {
    (@vnni [products] $body:path, $avx2:ident, $s:ident, ($($arg:ident),*)) => {
        $body($s, $($arg),*)
    };
    (@vnni [] $body:path, $avx2:ident, $s:ident, ($($arg:ident),*)) => {
        $avx2($s.avx2(), $($arg),*)
    };
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:path $(, $products:ident)?) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name(isa: $crate::backend::cpu::isa::Isa, $($arg: $ty),*) $(-> $ret)? {
            use $crate::backend::cpu::isa::{Avx2, Avx512, AvxVnni, Isa};

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
            #[allow(clippy::too_many_arguments)]
            fn avx512(s: Avx512, $($arg: $ty),*) $(-> $ret)? {
                $body(s, $($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avxvnni,avx2,fma,f16c")]
            #[allow(clippy::too_many_arguments)]
            fn avx_vnni(s: AvxVnni, $($arg: $ty),*) $(-> $ret)? {
                $crate::backend::cpu::isa::dispatch!(@vnni [$($products)?] $body, avx2, s, ($($arg),*))
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            #[allow(clippy::too_many_arguments)]
            fn avx2(s: Avx2, $($arg: $ty),*) $(-> $ret)? {
                $body(s, $($arg),*)
            }

            match isa {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: an `Avx512` exists only where `available` saw these features.
                Isa::Avx512(s) => unsafe { avx512(s, $($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: an `Amx` holds an `Avx512`.
                Isa::Amx(amx) => unsafe { avx512(amx.avx512(), $($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: an `AvxVnni` exists only where `available` saw these features.
                Isa::AvxVnni(s) => unsafe { avx_vnni(s, $($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: an `Avx2` exists only where `available` saw these features.
                Isa::Avx2(s) => unsafe { avx2(s, $($arg),*) },
                #[cfg(not(target_arch = "x86_64"))]
                Isa::Amx(_) | Isa::Avx512(Avx512 { .. }) | Isa::AvxVnni(AvxVnni { .. }) | Isa::Avx2(Avx2 { .. }) => {
                    unreachable!("never detected here")
                }
                Isa::Scalar(s) => $body(s, $($arg),*),
            }
        }
    };
}
pub(crate) use dispatch;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_instruction_set_is_refused_with_the_ones_there_are() {
        let error = Isa::named("mmx").unwrap_err().to_string();
        assert!(
            error.contains("`mmx`") && error.contains("scalar"),
            "{error}"
        );
    }

    #[test]
    fn every_available_instruction_set_is_found_by_its_name() {
        for isa in Isa::available() {
            assert_eq!(Isa::named(isa.name()).unwrap(), isa);
        }
    }
}
