//! The synchronous engine: carries out one request of a queue at a time, in the queue's thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::device::Device;
use super::queue::{Broken, Queue};

/// Bytes from which on a request is announced before the next one is carried out, where that takes no system call. The
/// driver then handles one while the back-end copies the next; with small requests, announcing several at once saves
/// more than that gains.
const LARGE: u64 = 64 << 10;

/// Carries out the requests of `queue` until there are none, the front-end stops the queue, or `interrupt` is set. A
/// queue that the driver has broken is stopped.
pub(super) fn serve(queue: &mut Queue, device: &dyn Device, interrupt: &AtomicBool) {
    let served = recover(queue, device).and_then(|()| process(queue, device, interrupt));
    if let Err(error) = served {
        log::warn!("queue {} is stopped, since its rings are broken: {error}", queue.index);
        queue.stop();
    }
}

/// Carries out the requests again that an earlier back-end left unfinished. They have been in flight ever since, so
/// nothing interrupts this.
fn recover(queue: &mut Queue, device: &dyn Device) -> Result<(), Broken> {
    for taken in queue.recover()? {
        let len = device.handle(&queue.memory, taken.chain, &mut || {});
        queue.complete(taken.head, len)?;
        queue.announce()?;
    }
    Ok(())
}

fn process(queue: &mut Queue, device: &dyn Device, interrupt: &AtomicBool) -> Result<(), Broken> {
    let memory = Arc::clone(&queue.memory);
    let proceed = |queue: &Queue| queue.is_running() && !interrupt.load(Ordering::Relaxed);
    while proceed(queue) {
        queue.ring.disable_kicks(&*memory)?;
        let mut unannounced = false;
        while proceed(queue) {
            let Some(taken) = queue.take()? else { break };
            let alone = queue.rings_directly() && taken.chain.len() >= LARGE;
            let mut announced = Ok(());
            let mut announce = || {
                if std::mem::take(&mut unannounced) {
                    announced = queue.announce();
                }
            };
            let len = device.handle(&memory, taken.chain, &mut announce);
            announced?;
            queue.complete(taken.head, len)?;
            if alone {
                queue.announce()?;
            }
            unannounced = !alone;
        }
        if unannounced {
            queue.announce()?;
        }
        if !proceed(queue) || !queue.has_more(interrupt)? {
            break;
        }
    }
    Ok(())
}
