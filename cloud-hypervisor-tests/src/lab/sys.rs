//! The few calls into libc that the lab needs: signals by process id, children that die with the test, file locks, terminals.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Makes the child that `command` starts receive SIGKILL when the thread that started it ends.
pub(super) fn die_with_parent(command: &mut Command) {
    let parent = std::process::id();
    let prepare = move || {
        // SAFETY: prctl and getppid take and change nothing but plain integers, and both may be called after fork.
        let orphaned = unsafe {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(io::Error::last_os_error());
            }
            libc::getppid().unsigned_abs() != parent
        };
        // The parent died before the call above took effect, so no signal will ever come.
        if orphaned { Err(io::Error::from_raw_os_error(libc::ESRCH)) } else { Ok(()) }
    };
    // SAFETY: `prepare` allocates nothing and takes no lock between fork and exec.
    unsafe { command.pre_exec(prepare) };
}

/// Sends `signal` to the process `pid`.
pub(super) fn signal(pid: u32, signal: libc::c_int) -> io::Result<()> {
    let pid = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
    // SAFETY: kill takes two integers; `pid` is positive, so it names one process, never a group.
    if unsafe { libc::kill(pid, signal) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Locks `file` for this process alone, waiting for others; the lock ends when the file is closed.
pub(super) fn lock_file(file: &File) -> io::Result<()> {
    // SAFETY: flock takes a descriptor, which `file` keeps open for the call, and an integer.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// A new terminal: the end that a user types on, and the one that a program takes for its terminal. Bytes pass as they are.
pub(super) fn open_terminal() -> io::Result<(File, OwnedFd)> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: takes an integer; the descriptor is new and owned from here on.
    let user = unsafe {
        let fd = libc::posix_openpt(flags);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        File::from_raw_fd(fd)
    };
    let fd = user.as_raw_fd();
    // SAFETY: `fd` is open. The new descriptor, never seen by a child that is started meanwhile, is owned from here on.
    let program = unsafe {
        if libc::grantpt(fd) != 0 || libc::unlockpt(fd) != 0 {
            return Err(io::Error::last_os_error());
        }
        let program = libc::ioctl(fd, libc::TIOCGPTPEER, flags);
        if program < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(program)
    };
    // Otherwise lines are cut at 4095 bytes, and what is typed comes back.
    // SAFETY: `termios` is plain data that tcgetattr fills, and the descriptor is open.
    let failed = unsafe {
        let mut settings: libc::termios = std::mem::zeroed();
        libc::tcgetattr(program.as_raw_fd(), &mut settings) != 0 || {
            libc::cfmakeraw(&mut settings);
            libc::tcsetattr(program.as_raw_fd(), libc::TCSANOW, &settings) != 0
        }
    };
    if failed { Err(io::Error::last_os_error()) } else { Ok((user, program)) }
}
