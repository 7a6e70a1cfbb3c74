//! Element types a checkpoint may hold, and widening to f32.

use half::{bf16, f16};

/// Element type of a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    F32,
    F16,
    Bf16,
    U8,
    I8,
    I32,
    I64,
    /// One that safetensors knows and no weight of ours has: such a tensor may stand in a file, and
    /// is refused where it is read.
    Other(OtherDtype),
}

/// Spelling and width of a type whose values are never read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OtherDtype {
    name: &'static str,
    bits: u8,
}

const OTHER: [OtherDtype; 13] = {
    const fn other(name: &'static str, bits: u8) -> OtherDtype {
        OtherDtype { name, bits }
    }
    [
        other("BOOL", 8),
        other("F4", 4),
        other("F6_E2M3", 6),
        other("F6_E3M2", 6),
        other("F8_E5M2", 8),
        other("F8_E4M3", 8),
        other("F8_E8M0", 8),
        other("I16", 16),
        other("U16", 16),
        other("U32", 32),
        other("F64", 64),
        other("U64", 64),
        other("C64", 64),
    ]
};

impl Dtype {
    /// The safetensors spelling, as error messages and fingerprints show it.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "F32",
            Dtype::F16 => "F16",
            Dtype::Bf16 => "BF16",
            Dtype::U8 => "U8",
            Dtype::I8 => "I8",
            Dtype::I32 => "I32",
            Dtype::I64 => "I64",
            Dtype::Other(other) => other.name,
        }
    }

    /// The type of that safetensors spelling, if it is one of the format's.
    pub fn parse(name: &str) -> Option<Dtype> {
        const ALL: [Dtype; 7] = [
            Dtype::F32,
            Dtype::F16,
            Dtype::Bf16,
            Dtype::U8,
            Dtype::I8,
            Dtype::I32,
            Dtype::I64,
        ];
        let others = OTHER.into_iter().map(Dtype::Other);
        ALL.into_iter()
            .chain(others)
            .find(|dtype| dtype.name() == name)
    }

    /// The spelling inside a bitsandbytes `quant_state` (`bfloat16`), for the float types.
    pub fn torch_name(self) -> Option<&'static str> {
        match self {
            Dtype::F32 => Some("float32"),
            Dtype::F16 => Some("float16"),
            Dtype::Bf16 => Some("bfloat16"),
            _ => None,
        }
    }

    /// Bytes of one element; 1 for types that pack several into a byte.
    pub fn size_bytes(self) -> usize {
        self.bits().div_ceil(8) as usize
    }

    /// Bits of one element.
    pub fn bits(self) -> u64 {
        match self {
            Dtype::F32 | Dtype::I32 => 32,
            Dtype::F16 | Dtype::Bf16 => 16,
            Dtype::U8 | Dtype::I8 => 8,
            Dtype::I64 => 64,
            Dtype::Other(other) => u64::from(other.bits),
        }
    }

    pub fn is_float(self) -> bool {
        matches!(self, Dtype::F32 | Dtype::F16 | Dtype::Bf16)
    }

    /// Widens little-endian `bytes` of a float type into `out`, exactly.
    ///
    /// The bytes need no alignment: they may lie anywhere in a mapped file.
    pub fn widen(self, bytes: &[u8], out: &mut [f32]) {
        assert!(self.is_float(), "{} is not a float type", self.name());
        assert_eq!(bytes.len(), out.len() * self.size_bytes());
        match self {
            Dtype::F32 => {
                for (o, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                    *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                }
            }
            Dtype::F16 => {
                for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *o = f16::from_le_bytes([b[0], b[1]]).to_f32();
                }
            }
            Dtype::Bf16 => {
                for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *o = bf16::from_le_bytes([b[0], b[1]]).to_f32();
                }
            }
            _ => unreachable!("checked above"),
        }
    }
}
