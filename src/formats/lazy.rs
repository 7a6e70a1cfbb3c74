//! Memory that is filled when it is first read and given back once all of it was used, so that what
//! was generated and what was made of it never exist together.

use std::io;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use memmap2::{MmapOptions, MmapRaw};

/// Given the number of a part and its bytes.
type Fill = Box<dyn Fn(usize, &mut [u8]) + Send + Sync>;

/// One stretch of memory in parts, each of which is filled by itself.
pub struct Lazy {
    map: MmapRaw,
    /// In ascending order
    parts: Vec<Part>,
    fill: Fill,
}

struct Part {
    range: Range<usize>,
    /// Held by who fills or empties it
    turn: Mutex<()>,
    filled: AtomicBool,
    /// Bytes given back since it was filled
    released: AtomicUsize,
}

impl Lazy {
    /// Memory that begins with `header` and has a part at each of `ranges`, ascending and apart.
    ///
    /// - `fill`: must give the same bytes each time, and must not read this memory
    ///
    /// # Errors
    /// If the system has no room for it.
    pub fn new(header: &[u8], ranges: Vec<Range<usize>>, fill: Fill) -> io::Result<Self> {
        let len = ranges.last().map_or(header.len(), |last| last.end);
        let mut map = MmapOptions::new().len(len).no_reserve_swap().map_anon()?;
        // Refused only where the kernel has no huge pages: slower, not wrong.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        map[..header.len()].copy_from_slice(header);
        let mut end = header.len();
        let mut part = |range: Range<usize>| {
            assert!(end <= range.start && range.start <= range.end);
            end = range.end;
            Part {
                range,
                turn: Mutex::new(()),
                filled: AtomicBool::new(false),
                released: AtomicUsize::new(0),
            }
        };
        let parts = ranges.into_iter().map(&mut part).collect();
        Ok(Lazy {
            map: map.into(),
            parts,
            fill,
        })
    }

    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// The part that holds all of `range`, which is relative to the whole; `None` for what lies outside
    /// or in several.
    pub fn part_of(&self, range: &Range<usize>) -> Option<usize> {
        let at = self.parts.partition_point(|p| p.range.end < range.end);
        let part = self.parts.get(at)?;
        (part.range.start <= range.start && range.end <= part.range.end).then_some(at)
    }

    /// The bytes of `range`. Of part `part`, which holds it, they are filled in; what is in no part, such
    /// as the header, is there, and parts that a wider range touches are as they happen to be.
    pub fn bytes(&self, part: Option<usize>, range: Range<usize>) -> &[u8] {
        if let Some(part) = part {
            self.ensure_filled(part);
        }
        assert!(range.end <= self.map.len());
        // SAFETY: inside the mapping, which lives as long as `self`; a part is written before it is
        // handed out, and again only after its readers gave it back (see `release`).
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().add(range.start), range.len()) }
    }

    fn ensure_filled(&self, at: usize) {
        let part = &self.parts[at];
        if part.filled.load(Ordering::Acquire) {
            return;
        }
        let _turn = part.turn.lock().expect("filling does not panic");
        if !part.filled.load(Ordering::Acquire) {
            // SAFETY: inside the mapping; nobody reads a part that is not filled, and the lock keeps
            // others from filling it.
            let out = unsafe {
                let start = self.map.as_mut_ptr().add(part.range.start);
                std::slice::from_raw_parts_mut(start, part.range.len())
            };
            (self.fill)(at, out);
            part.filled.store(true, Ordering::Release);
        }
    }

    pub fn part_len(&self, part: usize) -> usize {
        self.parts[part].range.len()
    }

    /// Whether a part holds its bytes now.
    pub fn is_filled(&self, part: usize) -> bool {
        self.parts[part].filled.load(Ordering::Acquire)
    }

    /// Fills `out` as part `part` would be, without touching its memory.
    pub fn fill_into(&self, part: usize, out: &mut [u8]) {
        assert_eq!(out.len(), self.parts[part].range.len());
        (self.fill)(part, out);
    }

    /// Counts `len` bytes of a part as used. Once that is all of it, its memory goes back to the system,
    /// and a later reader has it filled anew: by then nobody may hold a slice of it.
    pub fn release(&self, part: usize, len: usize) {
        let part = &self.parts[part];
        let released = part.released.fetch_add(len, Ordering::AcqRel) + len;
        if released < part.range.len() {
            return;
        }
        part.released.store(0, Ordering::Release);
        let _turn = part.turn.lock().expect("filling does not panic");
        if part.filled.swap(false, Ordering::AcqRel) {
            self.give_back(part.range.clone());
        }
    }

    /// Pages that only this range lies in.
    fn give_back(&self, range: Range<usize>) {
        #[cfg(target_os = "linux")]
        {
            const PAGE: usize = 4096;
            let start = range.start.next_multiple_of(PAGE);
            let end = range.end / PAGE * PAGE;
            if start < end {
                // SAFETY: the pages are a part's alone, and it counts as not filled.
                let _ = unsafe {
                    let advice = memmap2::UncheckedAdvice::DontNeed;
                    self.map.unchecked_advise_range(advice, start, end - start)
                };
            }
        }
        #[cfg(not(target_os = "linux"))]
        let _ = range;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::formats::Bytes;

    /// Two parts of 3 pages behind a header; counts how often each was filled.
    fn lazy(fills: &Arc<[AtomicUsize; 2]>) -> Bytes {
        let fills = Arc::clone(fills);
        let ranges = vec![100..100 + 12_288, 12_400..12_400 + 12_288];
        let fill = move |at: usize, out: &mut [u8]| {
            fills[at].fetch_add(1, Ordering::Relaxed);
            out.fill(at as u8 + 1);
        };
        Bytes::from(Lazy::new(&[7; 100], ranges, Box::new(fill)).unwrap())
    }

    #[test]
    fn a_part_is_filled_when_it_is_read_and_again_after_all_of_it_was_released() {
        let fills = Arc::new([const { AtomicUsize::new(0) }; 2]);
        let count = |at: usize| fills[at].load(Ordering::Relaxed);
        let whole = lazy(&fills);
        assert_eq!(whole.len(), 12_400 + 12_288);
        assert_eq!(whole[..100], [7; 100]);
        let second = whole.slice(12_400..whole.len());
        assert_eq!((count(0), count(1), second.len()), (0, 0, 12_288));
        assert!(second.iter().all(|&b| b == 2));
        let half = second.slice(6144..12_288);
        assert!(half.iter().all(|&b| b == 2));
        assert_eq!((count(0), count(1)), (0, 1));

        second.release(0..6144);
        assert!(half.iter().all(|&b| b == 2));
        assert_eq!(count(1), 1);
        half.release(0..6144);
        assert!(half.iter().all(|&b| b == 2));
        assert_eq!((count(0), count(1)), (0, 2));
    }

    #[test]
    fn detached_bytes_leave_the_part_empty() {
        let fills = Arc::new([const { AtomicUsize::new(0) }; 2]);
        let whole = lazy(&fills);
        let first = whole.slice(100..100 + 12_288).detached();
        drop(whole);
        assert!(first.iter().all(|&b| b == 1));
        assert_eq!(fills[0].load(Ordering::Relaxed), 1);
    }
}
