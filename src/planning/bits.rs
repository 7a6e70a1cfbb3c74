//! The small parts of the trace's encoding: packed ids, varints, a checksum.

/// Bits that hold any expert's id.
pub fn id_bits(num_experts: u16) -> usize {
    (u16::BITS - (num_experts - 1).leading_zeros()).max(1) as usize
}

pub fn put_ids(out: &mut Vec<u8>, ids: &[u16], bits: usize) {
    let (mut pending, mut filled) = (0u32, 0);
    for &id in ids {
        pending |= u32::from(id) << filled;
        filled += bits;
        while filled >= 8 {
            out.push(pending as u8);
            pending >>= 8;
            filled -= 8;
        }
    }
    if filled > 0 {
        out.push(pending as u8);
    }
}

pub fn unpack_ids(bytes: &[u8], count: usize, bits: usize) -> Vec<u16> {
    let mut bytes = bytes.iter();
    let (mut pending, mut filled) = (0u32, 0);
    let mut next = || {
        while filled < bits {
            pending |= u32::from(*bytes.next().expect("length was checked")) << filled;
            filled += 8;
        }
        let id = pending & ((1 << bits) - 1);
        pending >>= bits;
        filled -= bits;
        id as u16
    };
    (0..count).map(|_| next()).collect()
}

pub fn put_varint(out: &mut Vec<u8>, mut n: u32) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

pub fn take_varint(bytes: &mut &[u8]) -> Option<u32> {
    let mut n = 0u64;
    for shift in (0..35).step_by(7) {
        let byte = take(bytes, 1)?[0];
        n |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return u32::try_from(n).ok();
        }
    }
    None
}

pub fn take<'a>(bytes: &mut &'a [u8], len: usize) -> Option<&'a [u8]> {
    bytes.split_off(..len)
}

/// Carries a CRC-32 (IEEE, reflected) on over `bytes`; starts at `!0`, the result is inverted.
pub fn crc32(state: u32, bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut i = 0;
        while i < 256 {
            let mut crc = i as u32;
            let mut bit = 0;
            while bit < 8 {
                crc = (crc >> 1) ^ (0xedb8_8320 & 0u32.wrapping_sub(crc & 1));
                bit += 1;
            }
            table[i] = crc;
            i += 1;
        }
        table
    };
    bytes.iter().fold(state, |crc, &b| {
        TABLE[usize::from(crc as u8 ^ b)] ^ (crc >> 8)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn packed_ids_come_back(ids in proptest::collection::vec(0u16..300, 0..50)) {
            let bits = id_bits(300);
            let mut bytes = Vec::new();
            put_ids(&mut bytes, &ids, bits);
            prop_assert_eq!(bytes.len(), (ids.len() * 9).div_ceil(8));
            prop_assert_eq!(unpack_ids(&bytes, ids.len(), bits), ids);
        }

        #[test]
        fn varints_come_back(n: u32) {
            let mut bytes = Vec::new();
            put_varint(&mut bytes, n);
            prop_assert_eq!(take_varint(&mut bytes.as_slice()), Some(n));
            bytes.pop();
            prop_assert_eq!(take_varint(&mut bytes.as_slice()), None);
        }
    }

    #[test]
    fn an_id_takes_as_many_bits_as_the_largest_needs() {
        for (experts, bits) in [(1, 1), (2, 1), (3, 2), (256, 8), (257, 9), (512, 9)] {
            assert_eq!(id_bits(experts), bits);
        }
    }

    #[test]
    fn the_checksum_is_the_usual_one() {
        assert_eq!(!crc32(!0, b"123456789"), 0xcbf4_3926);
    }
}
