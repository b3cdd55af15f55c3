//! Memory and interrupts that the connected client lends to the device.

use std::os::fd::RawFd;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

use super::dma::DmaSpace;
use crate::durable::{Adopted, Fd, RestoreError};
use crate::pci::Host;

/// The client's memory for DMA and its eventfds for MSI-X vectors. Both are empty without a client.
#[derive(Debug)]
pub struct VmmHost {
    /// Device-VM memory by I/O virtual address.
    pub(crate) dma: DmaSpace,
    vectors: Vec<Option<Fd>>,
}

impl VmmHost {
    /// Makes a host that lends nothing yet, for a device with `vectors` MSI-X vectors.
    #[must_use]
    pub fn new(vectors: u16) -> Self {
        let mut dma = DmaSpace::default();
        // The maps of the client before are to be forgotten in the saved state, too.
        dma.clear();
        Self { dma, vectors: (0..vectors).map(|_| None).collect() }
    }

    /// Sets the eventfds of `count` vectors from `start` on, or removes those that the vectors have if `eventfds` is empty.
    ///
    /// # Errors
    /// `EINVAL` for vectors that the device does not have and for a number of eventfds that is neither `count` nor 0;
    /// an error of fcntl(2) for a descriptor whose mode cannot be set.
    pub(crate) fn set_vectors(
        &mut self,
        start: u32,
        count: u32,
        eventfds: Vec<impl Into<Fd>>,
    ) -> Result<(), Errno> {
        let eventfds: Vec<Fd> = eventfds.into_iter().map(Into::into).collect();
        let vectors = vector_range(start, count).and_then(|range| self.vectors.get_mut(range));
        let vectors = vectors.ok_or(Errno::INVAL)?;
        if !eventfds.is_empty() && eventfds.len() != vectors.len() {
            return Err(Errno::INVAL);
        }
        for eventfd in &eventfds {
            // A full counter must not block the device.
            fcntl_setfl(eventfd, fcntl_getfl(eventfd)? | OFlags::NONBLOCK)?;
        }
        let mut eventfds = eventfds.into_iter();
        for vector in vectors {
            *vector = eventfds.next();
        }
        Ok(())
    }

    /// The eventfds of the vectors, as they are saved.
    pub(super) fn save_vectors(&self) -> Vec<Option<RawFd>> {
        self.vectors.iter().map(|vector| vector.as_ref().map(Fd::number)).collect()
    }

    /// Restores the eventfds of the vectors.
    ///
    /// # Errors
    /// [`RestoreError`].
    pub(super) fn restore_vectors(
        &mut self,
        saved: Vec<Option<RawFd>>,
        left: &mut Adopted,
    ) -> Result<(), RestoreError> {
        for (vector, number) in self.vectors.iter_mut().zip(saved) {
            *vector = left.adopt_some(number)?;
        }
        Ok(())
    }

    /// Removes all eventfds.
    pub(super) fn clear_vectors(&mut self) {
        self.vectors.fill_with(|| None);
    }

    /// Signals `count` vectors from `start` on.
    ///
    /// # Errors
    /// `EINVAL` for vectors the device does not have.
    pub(super) fn fire_vectors(&self, start: u32, count: u32) -> Result<(), Errno> {
        let vectors = vector_range(start, count).and_then(|range| self.vectors.get(range));
        vectors.ok_or(Errno::INVAL)?.iter().flatten().for_each(signal);
        Ok(())
    }
}

fn vector_range(start: u32, count: u32) -> Option<std::ops::Range<usize>> {
    let end = usize::try_from(start.checked_add(count)?).ok()?;
    Some(usize::try_from(start).ok()?..end)
}

fn signal(eventfd: &Fd) {
    // A full counter means that a signal is pending.
    if let Err(error) = rustix::io::write(eventfd, &1u64.to_ne_bytes())
        && error != Errno::AGAIN
    {
        log::debug!("cannot signal an MSI-X vector: {error}");
    }
}

impl Host for VmmHost {
    type Memory = DmaSpace;

    fn memory(&self) -> &DmaSpace {
        &self.dma
    }

    fn signal(&self, vector: u16) {
        if let Some(Some(eventfd)) = self.vectors.get(usize::from(vector)) {
            signal(eventfd);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use std::os::fd::{AsFd, OwnedFd};

    /// An eventfd that would block, and a second handle of it to read.
    fn event() -> (OwnedFd, OwnedFd) {
        let event = eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd");
        let reader = event.try_clone().expect("dup");
        (event, reader)
    }

    fn count(reader: impl AsFd) -> u64 {
        let mut value = [0; 8];
        match rustix::io::read(reader, &mut value) {
            Ok(_) => u64::from_ne_bytes(value),
            Err(error) => {
                assert_eq!(error, Errno::AGAIN);
                0
            }
        }
    }

    #[test]
    fn vectors_are_set_replaced_and_taken_away() {
        let mut host = VmmHost::new(3);
        let ((a, read_a), (b, read_b), (c, read_c)) = (event(), event(), event());
        host.set_vectors(1, 2, vec![a, b]).expect("set");
        host.signal(0);
        host.signal(1);
        host.signal(2);
        host.signal(3);
        assert_eq!((count(&read_a), count(&read_b)), (1, 1));

        host.set_vectors(1, 1, vec![c]).expect("replace");
        host.signal(1);
        assert_eq!((count(&read_a), count(&read_c)), (0, 1));

        host.set_vectors(1, 1, Vec::<OwnedFd>::new()).expect("take away");
        host.signal(1);
        host.signal(2);
        assert_eq!((count(&read_c), count(&read_b)), (0, 1));

        host.fire_vectors(0, 3).expect("fire");
        assert_eq!(count(&read_b), 1);
        host.clear_vectors();
        host.signal(2);
        assert_eq!(count(&read_b), 0);
    }

    #[test]
    fn vectors_out_of_range_change_nothing() {
        let mut host = VmmHost::new(2);
        let (a, read_a) = event();
        host.set_vectors(0, 1, vec![a]).expect("set");
        for (start, count) in [(2, 1), (0, 3), (u32::MAX, 2), (1, u32::MAX)] {
            assert_eq!(host.set_vectors(start, count, Vec::<OwnedFd>::new()), Err(Errno::INVAL));
            assert_eq!(host.fire_vectors(start, count), Err(Errno::INVAL));
        }
        assert_eq!(host.set_vectors(0, 2, vec![event().0]), Err(Errno::INVAL));
        host.signal(0);
        assert_eq!(count(&read_a), 1);
    }

    #[test]
    fn a_full_counter_does_not_block() {
        let mut host = VmmHost::new(1);
        let (event, reader) = event();
        rustix::io::write(&event, &(u64::MAX - 1).to_ne_bytes()).expect("fill");
        host.set_vectors(0, 1, vec![event]).expect("set");
        host.signal(0);
        assert_eq!(count(&reader), u64::MAX - 1);
    }
}
