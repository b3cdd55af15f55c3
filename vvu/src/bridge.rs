//! The bridge: passes the messages of a vvu device to an ordinary vhost-user back-end, with new file descriptors for
//! those that the messages lost on their way.
//!
//! It serves one front-end at a time. It finds a back-end that answers before it lets a front-end connect, so that a
//! front-end never finds the device without a back-end. When the front-end leaves, the back-end gets a new connection
//! for the next one.

use std::os::fd::BorrowedFd;

use crate::driver::Driver;
use crate::pci::PciDevice;
use connect::connect;
pub use options::{BackendSocket, BridgeError, Options, Retry};
use session::{End, FrontendSession};

mod attachments;
mod connect;
#[cfg(fuzzing)]
pub mod hostile_device;
mod options;
mod session;
#[cfg(test)]
mod tests;

/// A vvu device and the socket of its back-end.
#[derive(Debug)]
pub struct Bridge<D: PciDevice> {
    driver: Driver<D>,
    options: Options,
}

impl<D: PciDevice> Bridge<D> {
    /// Makes a bridge between `driver` and the back-end that `options` name.
    #[must_use]
    pub fn new(driver: Driver<D>, options: Options) -> Self {
        Self { driver, options }
    }

    /// Serves one front-end after the other until one of `until` is readable or closed at its other end: a
    /// [`StopToken`](crate::StopToken), for example. Calls `ready` once, when the first front-end can connect.
    ///
    /// # Errors
    /// [`BridgeError`].
    pub fn run(&mut self, until: &[BorrowedFd<'_>], ready: impl FnOnce()) -> Result<(), BridgeError> {
        let mut ready = Some(ready);
        while let Some(backend) = connect(&self.options, until)? {
            let mut session = FrontendSession::new(&mut self.driver, backend);
            session.open()?;
            if let Some(ready) = ready.take() {
                ready();
            }
            match session.run(until)? {
                End::Stopped => {
                    session.close()?;
                    return Ok(());
                }
                End::FrontendLeft => log::info!("the front-end left"),
                End::Refused(reason) => {
                    log::error!("disconnected the front-end: {reason}");
                    session.close()?;
                }
                End::BackendLeft { reason, serving } => {
                    let socket = self.options.backend.name();
                    log::warn!("the back-end on {socket} left: {reason}");
                    session.close()?;
                    if self.options.retry == Retry::Never {
                        return Err(BridgeError::BackendLeft { socket, serving });
                    }
                }
            }
        }
        Ok(())
    }
}
