//! In-flight tracking (vhost-user, "Inflight I/O tracking"): which requests were taken and not yet
//! answered is written down in memory that outlives the back-end, so that the next one can finish them.
//!
//! The layout is the one of split rings, the only ones that our back-ends offer.

mod region;
mod resubmit;
mod tracker;

use std::sync::{Mutex, MutexGuard, PoisonError};

use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures};
use vm_memory::GuestMemoryMmap;

use crate::message_socket::Message;
use crate::spec::vhost_user::{MessageError, parse_u64};
use region::{Description, Region};

pub(super) use region::Limits;
pub(super) use region::RegionError;
pub(super) use resubmit::chains;
pub(super) use tracker::TrackerError;

/// What is tracked of one ring.
pub(super) type Tracker = tracker::Tracker<GuestMemoryMmap>;

/// In-flight tracking of one connection, shared between who talks to the front-end and the device.
#[derive(Debug)]
pub(super) struct Inflight {
    limits: Limits,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Protocol features that the front-end accepted.
    accepted: u64,
    region: Option<Region>,
}

/// What is to become of a message of the front-end.
#[derive(Debug)]
pub(super) enum Verdict {
    /// It is not about in-flight tracking.
    Pass(Message),
    /// This answer goes back, if there is one.
    Done(Option<Message>),
}

impl Inflight {
    /// No region yet, of what will be at most `limits`.
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The tracker of ring `index`, which has `size` descriptors; none if the front-end does without, or has made the
    /// region for smaller rings: QEMU 10.0 wants one for 128 descriptors and starts rings of 1024.
    ///
    /// # Errors
    /// [`RegionError`] when the region does not know the ring.
    pub(super) fn tracker(&self, index: usize, size: u16) -> Result<Option<Tracker>, RegionError> {
        match self.state().region.as_ref().map(|region| region.tracker(index, size)).transpose() {
            Err(error @ RegionError::NoPlace { queues, .. }) if index < usize::from(queues) => {
                log::warn!("queue {index} is served without in-flight tracking: {error}");
                Ok(None)
            }
            result => result,
        }
    }

    /// Deals with the messages that in-flight tracking is made of. Before the front-end has accepted
    /// the feature they pass, so that they are refused like those of any other feature.
    ///
    /// # Errors
    /// [`RegionError`] when the front-end is to be disconnected.
    pub(super) fn examine(&self, mut message: Message) -> Result<Verdict, RegionError> {
        let (header, mut state) = (message.header, self.state());
        let accepted = |feature: VhostUserProtocolFeatures| state.accepted & feature.bits() != 0;
        match FrontendReq::try_from(header.request) {
            Ok(FrontendReq::SET_PROTOCOL_FEATURES) => {
                state.accepted = parse_u64(header.request, message.payload())?;
                Ok(Verdict::Pass(message))
            }
            Ok(FrontendReq::GET_INFLIGHT_FD) if accepted(VhostUserProtocolFeatures::INFLIGHT_SHMFD) => {
                let asked = Description::parse(header.request, message.payload())?;
                // There is no other way to say no than to offer nothing.
                let (offered, file) = region::create(asked, self.limits)
                    .inspect_err(|error| log::warn!("no in-flight tracking: {error}"))
                    .map_or((Description::NOTHING, None), |(offered, file)| (offered, Some(file)));
                let size = u32::try_from(Description::SIZE).unwrap_or(u32::MAX);
                let mut answer = Message::new(header.reply(size), &offered.to_bytes());
                answer.fds.extend(file);
                Ok(Verdict::Done(Some(answer)))
            }
            Ok(FrontendReq::SET_INFLIGHT_FD) if accepted(VhostUserProtocolFeatures::INFLIGHT_SHMFD) => {
                let acknowledge = header.needs_reply() && accepted(VhostUserProtocolFeatures::REPLY_ACK);
                let fds = std::mem::take(&mut message.fds);
                let opened = Description::parse(header.request, message.payload())
                    .map_err(RegionError::from)
                    .and_then(|description| Region::open(description, fds, self.limits));
                let failed = match opened {
                    Ok(region) => {
                        state.region = Some(region);
                        false
                    }
                    Err(error) if acknowledge => {
                        log::warn!("refused the front-end's in-flight region: {error}");
                        true
                    }
                    Err(error) => return Err(error),
                };
                let answer = || Message::new(header.reply(8), &u64::from(failed).to_le_bytes());
                Ok(Verdict::Done(acknowledge.then(answer)))
            }
            _ => Ok(Verdict::Pass(message)),
        }
    }
}

impl From<MessageError> for RegionError {
    fn from(error: MessageError) -> Self {
        Self::Message(error)
    }
}
