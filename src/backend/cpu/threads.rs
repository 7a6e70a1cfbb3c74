//! The workers: pinned threads that spin between the blocks of a token and sleep when idle.
//!
//! A decode step is hundreds of jobs of a few microseconds, so starting one must cost about as
//! little as a cache miss: the caller publishes a job, works on it itself, and waits.

use std::any::Any;
use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::shares::Padded;
pub use super::shares::{Count, Paces, Shares, part_of};
use super::topology::{self, Core};
use crate::backend::{BackendError, Result};

/// An idle worker gives the core away between polls after this long ...
const YIELD_AFTER: Duration = Duration::from_micros(200);
/// ... and sleeps after this long.
const SLEEP_AFTER: Duration = Duration::from_millis(50);

/// What workers run: `job(item)` for items that each of them claims.
type Job<'a> = dyn Fn(usize) + Sync + 'a;

/// A fixed set of workers; the thread that calls [`run`](Pool::run) is the first of them.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    /// Number of the latest job, whether it is open, and how many workers are in it; see [`Gate`].
    gate: Padded<AtomicU64>,
    /// The latest job and its items; written only while it is closed and nobody is in it.
    job: UnsafeCell<Option<(*const Job<'static>, usize)>>,
    shares: Shares,
    sleeping: Vec<Padded<AtomicBool>>,
    stop: AtomicBool,
    panicked: Mutex<Option<String>>,
}

// SAFETY: all fields but `job` are made for sharing. The caller writes `job` only while the gate is
// closed with nobody inside, and workers read it only after entering an open gate. The job itself
// is `Sync`, and `run` keeps it alive until the gate is closed and everybody has left.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

/// What `Shared::gate` says.
///
/// A worker that has lost its core to another process when a job starts does not enter, and so
/// nobody waits for it: the others take its items. Waiting for all workers to look at every job
/// made decode fifty times slower beside a busy neighbour.
#[derive(Clone, Copy)]
struct Gate(u64);

impl Gate {
    const OPEN: u64 = 1 << 16;

    fn job(self) -> u64 {
        self.0 >> 17
    }
    fn is_open(self) -> bool {
        self.0 & Gate::OPEN != 0
    }
    fn inside(self) -> u64 {
        self.0 & (Gate::OPEN - 1)
    }
}

impl Pool {
    /// `threads` workers, or one per usable core; never more than there are cores, and performance cores
    /// first.
    ///
    /// # Errors
    /// If the system refuses to start a thread.
    pub fn new(threads: Option<usize>) -> Result<Pool> {
        let cores = topology::usable_cores();
        let count = threads.unwrap_or(cores.len()).clamp(1, cores.len());
        Pool::on(&cores[..count])
    }

    /// One worker per entry of `cores`, pinned there, save the first: that is the caller, who
    /// stays where the system puts it.
    fn on(cores: &[Core]) -> Result<Pool> {
        let shared = Arc::new(Shared {
            gate: Padded::default(),
            job: UnsafeCell::new(None),
            shares: Shares::new(topology::paces(cores)),
            sleeping: cores.iter().map(|_| Padded::default()).collect(),
            stop: AtomicBool::new(false),
            panicked: Mutex::new(None),
        });
        let mut pool = Pool {
            shared,
            workers: Vec::new(),
        };
        for (id, &core) in cores.iter().enumerate().skip(1) {
            let shared = Arc::clone(&pool.shared);
            let worker = thread::Builder::new()
                .name(format!("cpu-worker-{id}"))
                .spawn(move || {
                    topology::pin_current_thread(core.cpu);
                    shared.serve(id);
                })
                .map_err(|e| BackendError::Other(format!("cannot start worker {id}: {e}")))?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Workers, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// How the workers share work.
    pub fn paces(&self) -> &Paces {
        self.shared.shares.paces()
    }

    /// Runs `job(item)` once for every item below `items`, in no fixed order, and waits. How items are
    /// shared out: [`Shares`].
    ///
    /// # Errors
    /// If `job` panicked; some items may then not have run.
    pub fn run(&mut self, items: usize, job: &Job) -> Result<()> {
        if self.threads() == 1 || items <= 1 {
            return catch(|| (0..items).for_each(job));
        }
        let number = self.open(items, job);
        // When this returns, every item has been claimed.
        self.shared.work(number, 0, job, items);
        self.close()
    }

    /// As [`run`](Pool::run), with other workers beginning while `own` runs here; this thread joins them
    /// after it.
    ///
    /// # Errors
    /// If either panicked; some items may then not have run.
    pub fn run_beside<T>(&mut self, items: usize, job: &Job, own: impl FnOnce() -> T) -> Result<T> {
        if self.threads() == 1 || items <= 1 {
            let result = catch(own)?;
            self.run(items, job)?;
            return Ok(result);
        }
        let number = self.open(items, job);
        let result = catch(own);
        self.shared.work(number, 0, job, items);
        self.close()?;
        result
    }

    /// Runs `own` here while the other workers run `job(worker)`, once for each that has a core
    /// meanwhile, and waits for both.
    ///
    /// # Errors
    /// If either panicked.
    pub fn beside<T>(&mut self, job: &Job, own: impl FnOnce() -> T) -> Result<T> {
        if self.threads() == 1 {
            return catch(own);
        }
        // Worker 0 is this thread.
        let others = |worker| match worker {
            0 => {}
            _ => job(worker),
        };
        self.open(self.threads(), &others);
        let result = catch(own);
        self.close()?;
        result
    }

    /// Lets workers in. Whoever calls this must also call [`close`](Pool::close), whatever happens.
    fn open(&self, items: usize, job: &Job) -> u64 {
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. Workers use the pointer between here and the moment
        // the gate is closed and empty again, which the caller awaits, and nothing in between
        // returns or unwinds.
        let pointer: *const Job<'static> = unsafe { std::mem::transmute(job as *const Job) };
        // SAFETY: the gate is closed and empty, so no worker reads the job now.
        unsafe { *shared.job.get() = Some((pointer, items)) };
        let number = Gate(shared.gate.0.load(Ordering::Relaxed)).job() + 1;
        let open = number << 17 | Gate::OPEN;
        shared.gate.0.store(open, Ordering::SeqCst);
        for (id, worker) in self.workers.iter().enumerate() {
            if shared.sleeping[id + 1].0.load(Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
        number
    }

    /// Lets nobody in any more, and waits for those inside.
    fn close(&self) -> Result<()> {
        let shared = &*self.shared;
        shared.gate.0.fetch_and(!Gate::OPEN, Ordering::AcqRel);
        let mut waiting = Backoff::default();
        while Gate(shared.gate.0.load(Ordering::Acquire)).inside() > 0 {
            waiting.pause();
        }
        match shared.panicked.lock().unwrap().take() {
            Some(message) => Err(panic_error(&message)),
            None => Ok(()),
        }
    }

    /// Splits `data` into chunks of `chunk_len` and runs `job(i, chunk i)` for each.
    ///
    /// # Errors
    /// As [`run`](Pool::run).
    pub fn for_each_chunk<T: Send>(
        &mut self,
        data: &mut [T],
        chunk_len: usize,
        job: &(dyn Fn(usize, &mut [T]) + Sync),
    ) -> Result<()> {
        let len = data.len();
        let parts = Parts::new(data);
        self.run(len.div_ceil(chunk_len.max(1)), &|item| {
            let start = item * chunk_len;
            // SAFETY: items are run once each, and their chunks do not overlap.
            let chunk = unsafe { parts.slice(start..len.min(start + chunk_len)) };
            job(item, chunk);
        })
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for worker in &self.workers {
            worker.thread().unpark();
        }
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its jobs, so it ends without one.
            worker.join().ok();
        }
    }
}

impl Shared {
    /// The life of worker `id`.
    fn serve(&self, id: usize) {
        let mut last = 0;
        while let Some(number) = self.enter(id, last) {
            last = number;
            // SAFETY: this worker is inside the gate, so the job stays as it is, and alive.
            let (job, items) = unsafe { (*self.job.get()).expect("an open gate has a job") };
            // SAFETY: as above.
            self.work(number, id, unsafe { &*job }, items);
            self.gate.0.fetch_sub(1, Ordering::Release);
        }
    }

    /// Waits for an open job after `last` and enters it; `None` when the pool stops.
    fn enter(&self, id: usize, last: u64) -> Option<u64> {
        let mut waiting = Backoff::default();
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return None;
            }
            let gate = self.gate.0.load(Ordering::Relaxed);
            if Gate(gate).is_open() && Gate(gate).job() != last {
                let entered = self.gate.0.compare_exchange_weak(
                    gate,
                    gate + 1,
                    Ordering::Acquire,
                    Ordering::Relaxed,
                );
                if entered.is_ok() {
                    return Some(Gate(gate).job());
                }
            } else if waiting.pause() > SLEEP_AFTER {
                self.sleep(id, Gate(gate).job());
                waiting = Backoff::default();
            }
        }
    }

    /// Parks until there is a job after `last`, or the pool stops.
    ///
    /// `sleeping` is set before the last look at the gate, and the caller looks at `sleeping` after
    /// changing the gate: in sequentially consistent order, one of them sees the other.
    fn sleep(&self, id: usize, last: u64) {
        self.sleeping[id].0.store(true, Ordering::SeqCst);
        while Gate(self.gate.0.load(Ordering::SeqCst)).job() == last
            && !self.stop.load(Ordering::SeqCst)
        {
            thread::park();
        }
        self.sleeping[id].0.store(false, Ordering::SeqCst);
    }

    /// Claims and runs items of job `number`.
    fn work(&self, number: u64, id: usize, job: &Job, items: usize) {
        if let Err(error) = catch(|| self.shares.take(number as u32, id, items, job)) {
            self.panicked
                .lock()
                .unwrap()
                .get_or_insert(error.to_string());
        }
    }
}

/// Spins, then yields, so that a worker whose core has other work does not hold it up.
pub struct Backoff {
    since: Option<Instant>,
    spins: u32,
    waited: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Backoff {
            since: None,
            spins: 0,
            waited: Duration::ZERO,
        }
    }
}

impl Backoff {
    /// Waits a moment; returns how long it has been in all, looking at the clock now and then.
    pub fn pause(&mut self) -> Duration {
        self.spins += 1;
        if self.spins.is_multiple_of(64) {
            self.waited = self.since.get_or_insert_with(Instant::now).elapsed();
        }
        if self.waited > YIELD_AFTER {
            thread::yield_now();
        } else {
            std::hint::spin_loop();
        }
        self.waited
    }
}

fn catch<T>(f: impl FnOnce() -> T) -> Result<T> {
    catch_unwind(AssertUnwindSafe(f)).map_err(|payload| panic_error(panic_message(&*payload)))
}

fn panic_message(payload: &(dyn Any + Send)) -> &str {
    payload
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| payload.downcast_ref::<&str>().copied())
        .unwrap_or("no message")
}

fn panic_error(message: &str) -> BackendError {
    BackendError::Other(format!("cpu worker panicked: {message}"))
}

/// A mutable slice that the items of one job write to, each its own part.
pub struct Parts<'a, T> {
    start: *mut T,
    len: usize,
    lifetime: PhantomData<&'a mut [T]>,
}

// SAFETY: sharing a `Parts` hands out nothing; `slice` is where callers promise not to overlap.
unsafe impl<T: Send> Sync for Parts<'_, T> {}

impl<'a, T> Parts<'a, T> {
    pub fn new(data: &'a mut [T]) -> Self {
        Parts {
            start: data.as_mut_ptr(),
            len: data.len(),
            lifetime: PhantomData,
        }
    }

    /// The elements in `range`, to read.
    ///
    /// # Safety
    /// Nobody writes them while the slice lives.
    pub unsafe fn shared(&self, range: Range<usize>) -> &[T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: in bounds by the assertion, unchanged by the caller's promise.
        unsafe { std::slice::from_raw_parts(self.start.add(range.start), range.len()) }
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The slice again, when no item has a part of it any more.
    pub fn into_inner(self) -> &'a mut [T] {
        // SAFETY: it came from this slice, and `self`, by which others reached it, is gone.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }

    /// The elements in `range`.
    ///
    /// # Safety
    /// No two slices that live at the same time may overlap.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: in bounds by the assertion, exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }

    /// Element `i`.
    ///
    /// # Safety
    /// As [`slice`](Parts::slice).
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn item(&self, i: usize) -> &mut T {
        assert!(i < self.len);
        // SAFETY: in bounds by the assertion, exclusive by the caller's promise.
        unsafe { &mut *self.start.add(i) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    /// Four workers even where there are fewer cores, so that they get in each other's way.
    fn crowded() -> Pool {
        let core = topology::usable_cores()[0];
        Pool::on(&[core; 4]).unwrap()
    }

    #[test]
    fn every_item_runs_exactly_once() {
        let mut pool = crowded();
        for items in [0, 1, 2, 3, 4, 5, 17, 1000] {
            let counts: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
            pool.run(items, &|i| {
                counts[i].fetch_add(1, Ordering::Relaxed);
            })
            .unwrap();
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn chunks_cover_the_slice_without_overlap() {
        let mut pool = crowded();
        let mut data = vec![0; 103];
        pool.for_each_chunk(&mut data, 10, &|i, chunk| {
            chunk.iter_mut().for_each(|v| *v += i + 1)
        })
        .unwrap();
        assert!(data.iter().enumerate().all(|(i, &v)| v == i / 10 + 1));
    }

    #[test]
    fn a_panic_in_a_worker_is_an_error_and_the_pool_lives_on() {
        let mut pool = crowded();
        for round in 0..20 {
            let error = pool
                .run(100, &|i| assert!(i != 57, "item {i} of round {round}"))
                .unwrap_err()
                .to_string();
            assert!(error.contains("item 57"), "{error}");
            pool.run(100, &|_| {}).unwrap();
        }
    }

    #[test]
    fn workers_run_beside_their_caller_and_are_awaited() {
        for mut pool in [crowded(), Pool::new(Some(1)).unwrap()] {
            for round in 0..100 {
                let left = AtomicUsize::new(0);
                let own = pool.beside(
                    &|worker| {
                        assert!((1..4).contains(&worker));
                        left.fetch_add(1, Ordering::Relaxed);
                    },
                    || round,
                );
                assert_eq!(own.unwrap(), round);
                assert!(left.into_inner() <= 3);
            }
            let error = pool.beside(&|_| {}, || panic!("own")).unwrap_err();
            assert!(error.to_string().contains("own"), "{error}");
        }
        let mut pool = crowded();
        let entered = AtomicBool::new(false);
        let waiting = || {
            while !entered.load(Ordering::Relaxed) {
                thread::yield_now();
            }
        };
        let panics = |_: usize| {
            entered.store(true, Ordering::Relaxed);
            panic!("beside");
        };
        let error = pool.beside(&panics, waiting).unwrap_err();
        assert!(error.to_string().contains("beside"), "{error}");
        pool.run(100, &|_| {}).unwrap();
    }

    #[test]
    fn a_thousand_pools_start_work_and_stop() {
        for round in 0..1000 {
            let mut pool = crowded();
            let sum = AtomicUsize::new(0);
            for _ in 0..round % 3 {
                pool.run(8, &|i| {
                    sum.fetch_add(i, Ordering::Relaxed);
                })
                .unwrap();
            }
            assert_eq!(sum.into_inner(), 28 * (round % 3));
        }
    }

    #[test]
    fn workers_wake_from_sleep() {
        let mut pool = crowded();
        for _ in 0..3 {
            thread::sleep(SLEEP_AFTER * 2);
            let sum = AtomicUsize::new(0);
            pool.run(100, &|i| {
                sum.fetch_add(i, Ordering::Relaxed);
            })
            .unwrap();
            assert_eq!(sum.into_inner(), 4950);
        }
    }

    #[test]
    fn no_pool_has_more_workers_than_cores() {
        let cores = topology::usable_cores().len();
        assert_eq!(Pool::new(None).unwrap().threads(), cores);
        assert_eq!(Pool::new(Some(10_000)).unwrap().threads(), cores);
        assert_eq!(Pool::new(Some(0)).unwrap().threads(), 1);
    }
}
