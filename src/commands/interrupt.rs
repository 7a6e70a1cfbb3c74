//! Ctrl-C: the first asks for a clean end, the second ends at once.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
/// Since the last [`clear`]
static PRESSES: AtomicUsize = AtomicUsize::new(0);
/// After which the next one ends the program
static CLEAN_PRESSES: AtomicUsize = AtomicUsize::new(1);

/// Installs the handler; the flag it returns becomes true on Ctrl-C or SIGTERM.
pub fn flag() -> &'static AtomicBool {
    // A second call finds the handler installed, which is what it wants.
    let _ = ctrlc::set_handler(|| {
        INTERRUPTED.store(true, Ordering::SeqCst);
        let presses = PRESSES.fetch_add(1, Ordering::SeqCst);
        if presses >= CLEAN_PRESSES.load(Ordering::SeqCst) {
            std::process::exit(130);
        }
    });
    &INTERRUPTED
}

/// From now on Ctrl-C is part of the conversation: pressed a few times in haste, it still only sets the
/// flag, for [`clear`] to take back.
pub fn stops_only_what_runs() {
    const IN_HASTE: usize = 4;
    CLEAN_PRESSES.store(IN_HASTE, Ordering::SeqCst);
}

/// Forgets earlier presses.
pub fn clear() {
    INTERRUPTED.store(false, Ordering::SeqCst);
    PRESSES.store(0, Ordering::SeqCst);
}
