//! Feature bits that a vvu device lets through, and those that it clears.

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};

/// Protocol features that a vvu device can carry: they need only message bytes, or file descriptors
/// that the device replaces by resources of its own. The device clears every other bit.
pub const CARRIED_PROTOCOL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::RARP)
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::MTU)
    .union(VhostUserProtocolFeatures::BACKEND_REQ)
    .union(VhostUserProtocolFeatures::CROSS_ENDIAN)
    .union(VhostUserProtocolFeatures::CRYPTO_SESSION)
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    .union(VhostUserProtocolFeatures::RESET_DEVICE)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(VhostUserProtocolFeatures::STATUS);

/// Virtio feature bits that a vvu device clears: dirty logging needs a log that both sides map.
pub const MASKED_FEATURES: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();

/// `VHOST_USER_F_PROTOCOL_FEATURES`, bit 30 of the virtio features.
pub const F_PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
