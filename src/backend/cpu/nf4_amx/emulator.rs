//! AMX where there is none: the processor reports each instruction as illegal, and a signal handler
//! does what the manual says, so that tests run the kernel as it is, its machine code included.
//!
//! Source: Intel SDM volume 2, the instructions' pages and section 2.3 on VEX.

use std::cell::UnsafeCell;
use std::sync::OnceLock;

use crate::backend::cpu::isa::{Amx, Isa};

/// AMX of this machine, or else emulated; `None` without AVX-512, which the kernel needs as well.
pub fn amx() -> Option<Isa> {
    match *Isa::available().last()? {
        Isa::Amx(amx) => Some(Isa::Amx(amx)),
        Isa::Avx512(avx512) => {
            static INSTALLED: OnceLock<()> = OnceLock::new();
            INSTALLED.get_or_init(install);
            // SAFETY: from now on the handler executes the instructions.
            Some(Isa::Amx(unsafe { Amx::assume(avx512) }))
        }
        _ => None,
    }
}

fn install() {
    let handler: extern "C" fn(_, _, _) = on_illegal_instruction;
    // SAFETY: zero bits are a valid `sigaction`, and the handler has the type that SA_SIGINFO asks.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO;
        assert_eq!(
            libc::sigaction(libc::SIGILL, &action, std::ptr::null_mut()),
            0
        );
    }
}

extern "C" fn on_illegal_instruction(
    _: libc::c_int,
    _: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: SA_SIGINFO handlers get the registers of the interrupted thread, alone.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    // SAFETY: instructions are at most 15 bytes, and code goes on after an AMX one.
    let code = unsafe { *(registers[libc::REG_RIP as usize] as *const [u8; 15]) };
    let executed = Instruction::decode(&code).and_then(|instruction| {
        // SAFETY: only this thread has this state, and its handler is not entered twice.
        TILES.with(|tiles| unsafe { &mut *tiles.get() }.execute(&instruction, registers))
    });
    match executed {
        Some(len) => registers[libc::REG_RIP as usize] += len as i64,
        // SAFETY: plain call; the instruction, run again, now ends the process.
        None => unsafe {
            libc::signal(libc::SIGILL, libc::SIG_DFL);
        },
    }
}

/// The parts of an instruction `C4 RXB.02 W.vvvv.L.pp opcode modrm [sib] [displacement]`.
struct Instruction {
    /// Mandatory prefix: 0 none, 1 is 66, 2 is F3, 3 is F2
    prefix: u8,
    opcode: u8,
    /// Field of the modrm byte: a tile
    reg: usize,
    /// The other field: a tile or, with `memory`, part of an address
    rm: usize,
    /// The second source
    vvvv: usize,
    memory: Option<Address>,
    len: usize,
}

/// Numbers as in instructions; an index is a row stride
struct Address {
    base: usize,
    index: Option<usize>,
    scale: i64,
    displacement: i64,
}

impl Instruction {
    fn decode(code: &[u8; 15]) -> Option<Instruction> {
        let [0xc4, rxb, wvlp, opcode, modrm, sib, ..] = *code else {
            return None;
        };
        // Map 0F38, W and L zero.
        if rxb & 0x1f != 2 || wvlp & 0x84 != 0 {
            return None;
        }
        let extended =
            |bit: u8, field: u8| usize::from(field & 7) + 8 * usize::from(!rxb >> bit & 1);
        let (mode, rm) = (modrm >> 6, modrm & 7);
        let mut len = 5;
        let mut memory = None;
        if mode != 3 {
            let (mut base, mut index, mut scale) = (extended(5, rm), None, 0);
            if rm == 4 {
                len += 1;
                (base, scale) = (extended(5, sib), i64::from(1 << (sib >> 6)));
                index = Some(extended(6, sib >> 3)).filter(|&index| index != 4);
            }
            let displacement = match mode {
                // Relative to the instruction, or no base: not what a kernel writes.
                0 if base % 8 == 5 => return None,
                0 => 0,
                1 => i64::from(code[len].cast_signed()),
                _ => i64::from(i32::from_le_bytes(code[len..len + 4].try_into().ok()?)),
            };
            len += [0, 1, 4][usize::from(mode)];
            memory = Some(Address {
                base,
                index,
                scale,
                displacement,
            });
        }
        Some(Instruction {
            prefix: wvlp & 3,
            opcode,
            reg: extended(7, modrm >> 3),
            rm: extended(5, rm),
            vvvv: usize::from(!wvlp >> 3 & 15),
            memory,
            len,
        })
    }
}

thread_local! {
    // Without a destructor and with a constant to start with: nothing that a handler may not do.
    static TILES: UnsafeCell<Tiles> = const {
        UnsafeCell::new(Tiles {
            configured: false,
            rows: [0; 8],
            row_bytes: [0; 8],
            data: [[[0; 64]; 16]; 8],
        })
    };
}

/// The state of one thread.
struct Tiles {
    configured: bool,
    rows: [usize; 8],
    row_bytes: [usize; 8],
    data: [[[u8; 64]; 16]; 8],
}

/// Where an operand in memory starts, and how far apart its rows are.
fn locate(address: &Address, registers: &[libc::greg_t; 23]) -> (usize, usize) {
    const NUMBERS: [libc::c_int; 16] = [
        libc::REG_RAX,
        libc::REG_RCX,
        libc::REG_RDX,
        libc::REG_RBX,
        libc::REG_RSP,
        libc::REG_RBP,
        libc::REG_RSI,
        libc::REG_RDI,
        libc::REG_R8,
        libc::REG_R9,
        libc::REG_R10,
        libc::REG_R11,
        libc::REG_R12,
        libc::REG_R13,
        libc::REG_R14,
        libc::REG_R15,
    ];
    let value = |number: usize| registers[NUMBERS[number] as usize];
    let stride = address.index.map_or(0, |i| value(i) * address.scale);
    let start = value(address.base) + address.displacement;
    (start as usize, stride as usize)
}

impl Tiles {
    /// Returns the length of the instruction, or `None` if it is not legal.
    fn execute(&mut self, i: &Instruction, registers: &[libc::greg_t; 23]) -> Option<usize> {
        const NONE: u8 = 0;
        const P66: u8 = 1;
        const F3: u8 = 2;
        const F2: u8 = 3;
        let place = i.memory.as_ref().map(|address| locate(address, registers));
        match (i.prefix, i.opcode, place) {
            (NONE, 0x49, Some((address, _))) if i.reg == 0 => {
                // SAFETY: where the instruction would read, the kernel has a configuration.
                self.configure(unsafe { &*(address as *const [u8; 64]) })?;
            }
            (NONE, 0x49, None) if i.reg == 0 && i.rm == 0 => {
                self.configured = false;
                self.data = [[[0; 64]; 16]; 8];
            }
            (F2, 0x49, None) if i.rm == 0 => self.data[self.tile(i.reg)?] = [[0; 64]; 16],
            (F2 | P66, 0x4b, Some((address, stride))) => {
                let tile = self.tile(i.reg)?;
                let bytes = self.row_bytes[tile];
                self.data[tile] = [[0; 64]; 16];
                for row in 0..self.rows[tile] {
                    let source = (address + row * stride) as *const u8;
                    // SAFETY: where the instruction would read, the kernel has a square.
                    let source = unsafe { std::slice::from_raw_parts(source, bytes) };
                    self.data[tile][row][..bytes].copy_from_slice(source);
                }
            }
            (F3, 0x4b, Some((address, stride))) => {
                let tile = self.tile(i.reg)?;
                let bytes = self.row_bytes[tile];
                for row in 0..self.rows[tile] {
                    let out = (address + row * stride) as *mut u8;
                    // SAFETY: where the instruction would write, the kernel has a square.
                    let out = unsafe { std::slice::from_raw_parts_mut(out, bytes) };
                    out.copy_from_slice(&self.data[tile][row][..bytes]);
                }
            }
            // TDPB + SSD, SUD, USD, UUD: the first letter is the sign of the first source.
            (_, 0x5e, None) => {
                let (first_signed, second_signed) = match i.prefix {
                    F2 => (true, true),
                    F3 => (true, false),
                    P66 => (false, true),
                    _ => (false, false),
                };
                let tiles = [i.reg, i.rm, i.vvvv];
                self.add_products(tiles, first_signed, second_signed)?;
            }
            _ => return None,
        }
        Some(i.len)
    }

    fn configure(&mut self, config: &[u8; 64]) -> Option<()> {
        if config[0] != 1 || config[1..16] != [0; 15] {
            return None;
        }
        for tile in 0..8 {
            let bytes = &config[16 + 2 * tile..];
            self.row_bytes[tile] = usize::from(u16::from_le_bytes([bytes[0], bytes[1]]));
            self.rows[tile] = usize::from(config[48 + tile]);
            let unused = self.rows[tile] == 0;
            if self.rows[tile] > 16
                || self.row_bytes[tile] > 64
                || unused != (self.row_bytes[tile] == 0)
            {
                return None;
            }
        }
        self.configured = true;
        self.data = [[[0; 64]; 16]; 8];
        Some(())
    }

    /// The number of a tile, if there is such a one.
    fn tile(&self, number: usize) -> Option<usize> {
        (self.configured && number < 8 && self.rows[number] > 0).then_some(number)
    }

    fn add_products(
        &mut self,
        [sums, a, b]: [usize; 3],
        a_signed: bool,
        b_signed: bool,
    ) -> Option<()> {
        let [sums, a, b] = [self.tile(sums)?, self.tile(a)?, self.tile(b)?];
        let (rows, cols, quads) = (self.rows[sums], self.row_bytes[sums] / 4, self.rows[b]);
        let legal = sums != a
            && sums != b
            && a != b
            && self.rows[a] == rows
            && self.row_bytes[b] == 4 * cols
            && self.row_bytes[a] == 4 * quads;
        if !legal {
            return None;
        }
        let widen = |byte: u8, signed: bool| match signed {
            true => i32::from(byte.cast_signed()),
            false => i32::from(byte),
        };
        for row in 0..rows {
            for col in 0..cols {
                let lane = 4 * col..4 * col + 4;
                let old = self.data[sums][row][lane.clone()].try_into().ok()?;
                let mut sum = i32::from_le_bytes(old);
                for quad in 0..quads {
                    for byte in 0..4 {
                        let a = widen(self.data[a][row][4 * quad + byte], a_signed);
                        let b = widen(self.data[b][quad][4 * col + byte], b_signed);
                        sum = sum.wrapping_add(a * b);
                    }
                }
                self.data[sums][row][lane].copy_from_slice(&sum.to_le_bytes());
            }
        }
        Some(())
    }
}

#[test]
fn instructions_are_decoded_as_objdump_does() {
    // c4 a2 7b 4b 1c 00: tileloadd 0x0(%rax,%r8,1),%tmm3
    let code = [
        0xc4, 0xa2, 0x7b, 0x4b, 0x1c, 0x00, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    let i = Instruction::decode(&code).unwrap();
    let memory = i.memory.unwrap();
    assert_eq!((i.prefix, i.opcode, i.reg, i.len), (3, 0x4b, 3, 6));
    assert_eq!((memory.base, memory.index, memory.scale), (0, Some(8), 1));
    // c4 e2 53 5e c3: tdpbssd %tmm5,%tmm3,%tmm0
    let code = [0xc4, 0xe2, 0x53, 0x5e, 0xc3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let i = Instruction::decode(&code).unwrap();
    assert_eq!((i.prefix, i.opcode, i.len), (3, 0x5e, 5));
    assert_eq!((i.reg, i.rm, i.vvvv), (0, 3, 5));
    assert!(Instruction::decode(&[0x90; 15]).is_none());
}
