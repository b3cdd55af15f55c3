//! The table of all vhost-user requests: payload, file descriptors, reply, and whether a vvu device
//! carries the request.
//!
//! The device, the bridge in the guest, the trace and `docs/compatibility.md` read this table, so a
//! new request is one new row.

use super::payload::Payload::{self, *};

/// One request: a row of [`FRONTEND_REQUESTS`] or [`BACKEND_REQUESTS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Code in the message header.
    pub code: u32,
    /// Name in the vhost-user specification, without `VHOST_USER_`.
    pub name: &'static str,
    /// Payload of the request.
    pub payload: Payload,
    /// File descriptors attached to the request.
    pub fds: Fds,
    /// When the receiver replies, and with what.
    pub reply: Reply,
    /// Whether a vvu device carries the request.
    pub carried: Carried,
}

/// File descriptors attached to a request: how many, and what they are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fds {
    /// None.
    None,
    /// One file for each region of the memory table.
    PerRegion,
    /// The file of the one region.
    OfRegion,
    /// The file of the one region, or none: it identifies nothing that the addresses do not.
    OfRegionOptional,
    /// The file of the in-flight region.
    OfInflight,
    /// The eventfd that the driver's notifications of a queue signal; none if the payload says so.
    Kick,
    /// The eventfd that interrupts of a queue signal; none if the payload says so.
    Call,
    /// The eventfd that errors of a queue signal; none if the payload says so.
    Err,
    /// A socket for requests of the back-end.
    BackendChannel,
    /// Something that no resource of a vvu device can stand for.
    Foreign(&'static str),
}

/// When the receiver of a request replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Always, with this payload.
    Always(Payload),
    /// If the sender asks for it and `REPLY_ACK` is negotiated: a u64 that is 0 for success.
    OnRequest,
}

/// Whether a vvu device carries a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carried {
    /// The device relays it, perhaps changed.
    Yes,
    /// The device refuses it, for this reason.
    No(&'static str),
}

impl Request {
    /// The request of a front-end with this code.
    #[must_use]
    pub fn of_frontend(code: u32) -> Option<&'static Self> {
        FRONTEND_REQUESTS.iter().find(|row| row.code == code)
    }

    /// The request of a back-end with this code.
    #[must_use]
    pub fn of_backend(code: u32) -> Option<&'static Self> {
        BACKEND_REQUESTS.iter().find(|row| row.code == code)
    }

    /// Whether the receiver replies even if the sender does not ask for an acknowledgement.
    #[must_use]
    pub fn is_query(&self) -> bool {
        matches!(self.reply, Reply::Always(_))
    }

    /// Whether a vvu device carries the request.
    #[must_use]
    pub fn is_carried(&self) -> bool {
        self.carried == Carried::Yes
    }

    /// The payload of a reply to this request.
    #[must_use]
    pub fn reply_payload(&self) -> Payload {
        match self.reply {
            Reply::Always(payload) => payload,
            Reply::OnRequest => U64,
        }
    }
}

/// A request that a device carries and that is acknowledged on request.
const fn command(code: u32, name: &'static str, payload: Payload, fds: Fds) -> Request {
    Request { code, name, payload, fds, reply: Reply::OnRequest, carried: Carried::Yes }
}

/// A request that a device carries and that is always answered with `reply`.
const fn query(code: u32, name: &'static str, payload: Payload, reply: Payload) -> Request {
    Request { code, name, payload, fds: Fds::None, reply: Reply::Always(reply), carried: Carried::Yes }
}

/// A request that a device refuses; `reply` describes only how the device itself answers.
const fn refused(code: u32, name: &'static str, payload: Payload, fds: Fds, why: &'static str) -> Request {
    Request { code, name, payload, fds, reply: Reply::OnRequest, carried: Carried::No(why) }
}

const LOG: &str = "needs a log of written pages that both sides map; LOG_ALL and LOG_SHMFD are masked";
const POSTCOPY: &str = "needs userfaultfd; PAGEFAULT is masked";
const STATE: &str = "needs a pipe between front-end and back-end; DEVICE_STATE is masked";
const SHARED_OBJECT: &str = "needs dma-buf file descriptors; SHARED_OBJECT is masked";
const SHMEM: &str = "needs memory of the back-end in the sibling; SHMEM is masked";
const GPU: &str = "needs a second socket, for the display: vhost-user-gpu cannot work";
const INBAND: &str = "a device notifies through eventfds; INBAND_NOTIFICATIONS is masked";
const HOST_NOTIFIER: &str = "needs a doorbell page of the back-end; HOST_NOTIFIER is masked";

/// Requests of a front-end (vhost-user, "Front-end message types").
pub const FRONTEND_REQUESTS: [Request; 44] = [
    query(1, "GET_FEATURES", Empty, Features),
    command(2, "SET_FEATURES", Features, Fds::None),
    command(3, "SET_OWNER", Empty, Fds::None),
    command(4, "RESET_OWNER", Empty, Fds::None),
    command(5, "SET_MEM_TABLE", MemoryTable, Fds::PerRegion),
    refused(6, "SET_LOG_BASE", Other("VhostUserLog"), Fds::Foreign("the log"), LOG),
    refused(7, "SET_LOG_FD", Empty, Fds::Foreign("an eventfd for log writes"), LOG),
    command(8, "SET_VRING_NUM", VringState, Fds::None),
    command(9, "SET_VRING_ADDR", VringAddr, Fds::None),
    command(10, "SET_VRING_BASE", VringState, Fds::None),
    query(11, "GET_VRING_BASE", VringState, VringState),
    command(12, "SET_VRING_KICK", VringEventfd, Fds::Kick),
    command(13, "SET_VRING_CALL", VringEventfd, Fds::Call),
    command(14, "SET_VRING_ERR", VringEventfd, Fds::Err),
    query(15, "GET_PROTOCOL_FEATURES", Empty, ProtocolFeatures),
    command(16, "SET_PROTOCOL_FEATURES", ProtocolFeatures, Fds::None),
    query(17, "GET_QUEUE_NUM", Empty, QueueCount),
    command(18, "SET_VRING_ENABLE", VringState, Fds::None),
    command(19, "SEND_RARP", U64, Fds::None),
    command(20, "NET_SET_MTU", U64, Fds::None),
    command(21, "SET_BACKEND_REQ_FD", Empty, Fds::BackendChannel),
    command(22, "IOTLB_MSG", Iotlb, Fds::None),
    command(23, "SET_VRING_ENDIAN", VringState, Fds::None),
    query(24, "GET_CONFIG", Config, Config),
    command(25, "SET_CONFIG", Config, Fds::None),
    query(26, "CREATE_CRYPTO_SESSION", Other("VhostUserCryptoSession"), Other("VhostUserCryptoSession")),
    command(27, "CLOSE_CRYPTO_SESSION", U64, Fds::None),
    refused(28, "POSTCOPY_ADVISE", Empty, Fds::Foreign("a userfaultfd in the reply"), POSTCOPY),
    refused(29, "POSTCOPY_LISTEN", Empty, Fds::None, POSTCOPY),
    refused(30, "POSTCOPY_END", Empty, Fds::None, POSTCOPY),
    query(31, "GET_INFLIGHT_FD", Inflight, Inflight),
    command(32, "SET_INFLIGHT_FD", Inflight, Fds::OfInflight),
    refused(33, "GPU_SET_SOCKET", Empty, Fds::Foreign("a socket"), GPU),
    command(34, "RESET_DEVICE", Empty, Fds::None),
    refused(35, "VRING_KICK", VringState, Fds::None, INBAND),
    query(36, "GET_MAX_MEM_SLOTS", Empty, U64),
    command(37, "ADD_MEM_REG", SingleRegion, Fds::OfRegion),
    command(38, "REM_MEM_REG", SingleRegion, Fds::OfRegionOptional),
    command(39, "SET_STATUS", U64, Fds::None),
    query(40, "GET_STATUS", Empty, U64),
    refused(
        41,
        "GET_SHARED_OBJECT",
        Other("VhostUserShared"),
        Fds::Foreign("a dma-buf in the reply"),
        SHARED_OBJECT,
    ),
    refused(42, "SET_DEVICE_STATE_FD", Other("DeviceStateTransfer"), Fds::Foreign("a pipe"), STATE),
    refused(43, "CHECK_DEVICE_STATE", Empty, Fds::None, STATE),
    refused(44, "GET_SHMEM_CONFIG", Empty, Fds::None, SHMEM),
];

/// Requests of a back-end (vhost-user, "Back-end message types").
pub const BACKEND_REQUESTS: [Request; 10] = [
    command(1, "IOTLB_MSG", Iotlb, Fds::None),
    command(2, "CONFIG_CHANGE_MSG", Empty, Fds::None),
    refused(
        3,
        "VRING_HOST_NOTIFIER_MSG",
        Other("VhostUserVringArea"),
        Fds::Foreign("a doorbell page"),
        HOST_NOTIFIER,
    ),
    refused(4, "VRING_CALL", VringState, Fds::None, INBAND),
    refused(5, "VRING_ERR", VringState, Fds::None, INBAND),
    refused(6, "SHARED_OBJECT_ADD", Other("VhostUserShared"), Fds::None, SHARED_OBJECT),
    refused(7, "SHARED_OBJECT_REMOVE", Other("VhostUserShared"), Fds::None, SHARED_OBJECT),
    refused(
        8,
        "SHARED_OBJECT_LOOKUP",
        Other("VhostUserShared"),
        Fds::Foreign("a dma-buf in the reply"),
        SHARED_OBJECT,
    ),
    refused(9, "SHMEM_MAP", Other("VhostUserMMap"), Fds::Foreign("memory of the back-end"), SHMEM),
    refused(10, "SHMEM_UNMAP", Other("VhostUserMMap"), Fds::None, SHMEM),
];

#[cfg(test)]
#[path = "requests_test.rs"]
mod tests;
