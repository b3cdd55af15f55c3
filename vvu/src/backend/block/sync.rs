//! The synchronous engine: carries out one request at a time, by system calls of the thread that begins it.

use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use super::device::BlockDevice;
use super::job::{Job, Next};
use super::means::Means;
use crate::backend::engine::{Engine, Finished};
use crate::backend::queue::Taken;

/// The engine of one queue.
#[derive(Debug)]
pub(super) struct SyncEngine {
    means: Means,
}

impl SyncEngine {
    pub(super) fn new(device: Arc<BlockDevice>) -> Self {
        Self { means: Means::new(device, None) }
    }
}

impl Engine for SyncEngine {
    fn begin(
        &mut self,
        memory: &Arc<GuestMemoryMmap>,
        Taken { head, chain }: Taken,
        announce: &mut dyn FnMut(),
    ) -> Option<Finished> {
        let device = Arc::clone(&self.means.device);
        let size = chain.len();
        let mut job = Job::new(&device, memory, chain);
        if job.is_slow() {
            announce();
        }
        let disk = device.disk();
        let mut releases = None;
        loop {
            match job.next(&mut self.means) {
                Next::Step(step) => {
                    let result = disk.admit(step).and_then(|step| disk.carry_out(step));
                    job.done(result, &mut self.means);
                    releases = None;
                }
                // Tried once more after the count was taken, so no release is missed.
                Next::Wait => match releases {
                    None => releases = Some(disk.gate.releases()),
                    Some(seen) => {
                        disk.gate.wait_beyond(seen);
                        releases = None;
                    }
                },
                Next::End => return Some(Finished { head, written: job.finish(&device), size }),
            }
        }
    }
}
