//! Tells a service manager how far this process is (sd_notify(3)).

use sd_notify::NotifyState;

/// Tells it that clients can connect, if it has asked by `NOTIFY_SOCKET`.
pub(crate) fn ready() {
    if let Err(error) = sd_notify::notify(&[NotifyState::Ready]) {
        log::warn!("cannot tell the service manager that the sockets listen: {error}");
    }
}
