//! The program on a pseudo-terminal: what is typed at it and what its screen was sent.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

pub const ENTER: &str = "\r";
pub const ALT_ENTER: &str = "\x1b\r";
pub const CTRL_C: &str = "\x03";
pub const CTRL_D: &str = "\x04";
pub const UP: &str = "\x1b[A";
pub const LEFT: &str = "\x1b[D";

/// How long anything that is waited for may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A program whose standard streams are a terminal.
pub struct Terminal {
    child: Child,
    keyboard: File,
    screen: Receiver<Vec<u8>>,
    /// Sent and not yet waited for
    unread: String,
    /// All that was sent
    pub log: String,
}

impl Terminal {
    pub fn start(command: Command) -> Self {
        Self::of_width(100, command)
    }

    pub fn of_width(columns: u16, mut command: Command) -> Self {
        let (master, slave) = open(columns);
        let stream = || Stdio::from(slave.try_clone().unwrap());
        command.env("TERM", "xterm-256color");
        command.stdin(stream()).stdout(stream()).stderr(stream());
        // SAFETY: both calls are safe between fork and exec; standard input is the terminal by then.
        unsafe {
            command.pre_exec(|| {
                let ok = libc::setsid() >= 0 && libc::ioctl(0, libc::TIOCSCTTY, 0) == 0;
                ok.then_some(()).ok_or_else(std::io::Error::last_os_error)
            });
        }
        let child = command.spawn().unwrap();
        drop(command);
        drop(slave);
        let keyboard = File::from(master);
        let mut output = keyboard.try_clone().unwrap();
        let (sender, screen) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // Reading a terminal that nobody has open any more is an error on Linux.
            while let Ok(read @ 1..) = output.read(&mut buffer) {
                let _ = sender.send(buffer[..read].to_vec());
            }
        });
        Terminal {
            child,
            keyboard,
            screen,
            unread: String::new(),
            log: String::new(),
        }
    }

    pub fn keys(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    /// Types a line and Enter.
    pub fn line(&mut self, text: &str) {
        self.keys(text);
        self.keys(ENTER);
    }

    /// Waits until `text` was sent; returns what came before it.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some((before, after)) = self.unread.split_once(text) {
                let before = before.to_owned();
                self.unread = after.to_owned();
                return before;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match self.screen.recv_timeout(left) {
                Ok(bytes) => {
                    let text = String::from_utf8_lossy(&bytes).into_owned();
                    self.log.push_str(&text);
                    self.unread.push_str(&text);
                }
                Err(RecvTimeoutError::Timeout) => panic!("no `{text}` in {:?}", self.log),
                Err(RecvTimeoutError::Disconnected) => {
                    panic!("ended without `{text}`: {:?}", self.log)
                }
            }
        }
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: a signal to a child that has not been waited for, so the id is its own.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, signal) }, 0);
    }

    /// Whether the terminal shows what is typed, as it does outside a line editor.
    pub fn echoes(&self) -> bool {
        let mut modes = std::mem::MaybeUninit::<libc::termios>::uninit();
        // SAFETY: the call fills the struct if it returns 0.
        let modes = unsafe {
            assert_eq!(
                libc::tcgetattr(self.keyboard.as_raw_fd(), modes.as_mut_ptr()),
                0
            );
            modes.assume_init()
        };
        modes.c_lflag & libc::ECHO != 0
    }

    /// Waits for the end of the program.
    #[track_caller]
    pub fn end(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                while let Ok(bytes) = self.screen.recv_timeout(Duration::from_millis(200)) {
                    self.log.push_str(&String::from_utf8_lossy(&bytes));
                }
                return status;
            }
            assert!(Instant::now() < deadline, "does not end: {:?}", self.log);
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn open(columns: u16) -> (OwnedFd, OwnedFd) {
    let (mut master, mut slave) = (-1, -1);
    let size = libc::winsize {
        ws_row: 30,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let null = std::ptr::null_mut();
    // SAFETY: the pointers are to variables that live through the call.
    let opened = unsafe { libc::openpty(&mut master, &mut slave, null, null.cast(), &size) };
    assert_eq!(opened, 0);
    // SAFETY: two descriptors that were just opened and belong to nobody else.
    unsafe { (OwnedFd::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) }
}
