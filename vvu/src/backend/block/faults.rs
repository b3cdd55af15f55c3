//! Errors of the disk that tests and fuzz targets ask for. In an ordinary build there are none.

#[cfg(not(any(test, fuzzing)))]
use std::io;

/// A kind of system call on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    Read,
    Write,
    Flush,
    Allocate,
}

#[cfg(not(any(test, fuzzing)))]
#[derive(Debug, Default)]
pub(super) struct Faults(());

#[cfg(not(any(test, fuzzing)))]
impl Faults {
    /// Fails in place of a call.
    #[expect(clippy::unused_self, clippy::unnecessary_wraps, reason = "tests make it fail")]
    pub(super) fn check(&self, _call: Call) -> io::Result<()> {
        Ok(())
    }

    /// The number of pieces that a call may transfer, of `count`, or an error in its place.
    #[expect(clippy::unused_self, clippy::unnecessary_wraps, reason = "tests make it fail")]
    pub(super) fn limit(&self, _call: Call, count: usize) -> io::Result<usize> {
        Ok(count)
    }
}

#[cfg(any(test, fuzzing))]
pub(super) use injected::{Fault, Faults};

#[cfg(any(test, fuzzing))]
mod injected {
    use std::collections::VecDeque;
    use std::io;
    use std::sync::Mutex;

    use super::Call;

    /// What becomes of a call.
    #[derive(Clone, Copy, Debug)]
    pub(in super::super) enum Fault {
        /// It fails with this error number.
        Error(i32),
        /// It transfers no more than one piece.
        Short,
    }

    /// What becomes of the next calls, one by one.
    #[derive(Debug, Default)]
    pub(in super::super) struct Faults(Mutex<VecDeque<(Call, Fault)>>);

    impl Faults {
        /// Lets the next call of this kind fail for which nothing has been set yet.
        pub(in super::super) fn inject(&self, call: Call, fault: Fault) {
            self.0.lock().expect("no panic before").push_back((call, fault));
        }

        /// Forgets the faults that have not happened.
        pub(in super::super) fn clear(&self) {
            self.0.lock().expect("no panic before").clear();
        }

        fn next(&self, call: Call) -> Option<Fault> {
            let mut faults = self.0.lock().expect("no panic before");
            let position = faults.iter().position(|(of, _)| *of == call)?;
            faults.remove(position).map(|(_, fault)| fault)
        }

        pub(in super::super) fn check(&self, call: Call) -> io::Result<()> {
            self.limit(call, 1).map(drop)
        }

        pub(in super::super) fn limit(&self, call: Call, count: usize) -> io::Result<usize> {
            match self.next(call) {
                None => Ok(count),
                Some(Fault::Short) => Ok(1),
                Some(Fault::Error(number)) => Err(io::Error::from_raw_os_error(number)),
            }
        }
    }
}
