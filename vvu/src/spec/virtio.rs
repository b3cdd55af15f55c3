//! Virtio registers and bits (virtio 1.2) and the device configuration of virtio-vhost-user.

/// Virtio device id of virtio-vhost-user, as crosvm had it; none was ever assigned.
pub const DEVICE_ID: u16 = 61;

/// Queue that carries messages from the front-end to the driver.
pub const RX_QUEUE: u16 = 0;
/// Queue that carries messages from the driver to the front-end.
pub const TX_QUEUE: u16 = 1;
/// Number of virtqueues.
pub const QUEUE_COUNT: u16 = 2;
/// Largest virtqueue, in descriptors.
pub const QUEUE_SIZE_MAX: u16 = 256;

/// MSI-X vector number that means "no vector" (virtio 1.2, 4.1.4.3).
pub const NO_VECTOR: u16 = 0xffff;

/// Offsets in the common configuration (virtio 1.2, 4.1.4.3).
pub mod common {
    /// le32.
    pub const DEVICE_FEATURE_SELECT: u64 = 0;
    /// le32.
    pub const DEVICE_FEATURE: u64 = 4;
    /// le32.
    pub const DRIVER_FEATURE_SELECT: u64 = 8;
    /// le32.
    pub const DRIVER_FEATURE: u64 = 12;
    /// le16.
    pub const CONFIG_MSIX_VECTOR: u64 = 16;
    /// le16.
    pub const NUM_QUEUES: u64 = 18;
    /// Byte.
    pub const DEVICE_STATUS: u64 = 20;
    /// Byte.
    pub const CONFIG_GENERATION: u64 = 21;
    /// le16.
    pub const QUEUE_SELECT: u64 = 22;
    /// le16.
    pub const QUEUE_SIZE: u64 = 24;
    /// le16.
    pub const QUEUE_MSIX_VECTOR: u64 = 26;
    /// le16.
    pub const QUEUE_ENABLE: u64 = 28;
    /// le16.
    pub const QUEUE_NOTIFY_OFF: u64 = 30;
    /// le64, written as two halves.
    pub const QUEUE_DESC: u64 = 32;
    /// le64, written as two halves.
    pub const QUEUE_DRIVER: u64 = 40;
    /// le64, written as two halves.
    pub const QUEUE_DEVICE: u64 = 48;
}

/// Device status bits (virtio 1.2, 2.1).
pub mod status {
    /// The driver saw the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The driver can drive the device.
    pub const DRIVER: u8 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 4;
    /// Features are agreed.
    pub const FEATURES_OK: u8 = 8;
    /// The device needs a reset.
    pub const NEEDS_RESET: u8 = 64;
    /// The driver gave up.
    pub const FAILED: u8 = 128;
}

/// Feature bits that the vvu device offers (virtio 1.2, 6).
pub mod feature {
    /// Bit 29: `used_event` and `avail_event`.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// Bit 32: virtio 1.0 or later.
    pub const VERSION_1: u64 = 1 << 32;
    /// Bit 33: the device reaches memory through the platform's IOMMU.
    pub const ACCESS_PLATFORM: u64 = 1 << 33;
    /// What the vvu device offers.
    pub const OFFERED: u64 = EVENT_IDX | VERSION_1 | ACCESS_PLATFORM;
}

/// ISR status bits (virtio 1.2, 4.1.4.5).
pub mod isr {
    /// A virtqueue has news.
    pub const QUEUE: u8 = 1;
    /// The device configuration changed.
    pub const CONFIG: u8 = 2;
}

/// Device configuration of virtio-vhost-user: 24 bytes, little-endian.
pub mod device_config {
    /// le32: link state, [`BACKEND_UP`] and [`FRONTEND_UP`].
    pub const STATUS: u64 = 0;
    /// le32: vhost queues the device can carry.
    pub const MAX_VHOST_QUEUES: u64 = 4;
    /// 16 bytes: identifies the device.
    pub const UUID: u64 = 8;
    /// Length of the structure.
    pub const SIZE: usize = 24;

    /// Status bit 0, written by the driver: a back-end waits for a front-end.
    pub const BACKEND_UP: u32 = 1;
    /// Status bit 1, set by the device: a front-end is connected.
    pub const FRONTEND_UP: u32 = 2;
}

/// Offsets in the vector select structure.
pub mod vector_select {
    /// le16: vhost queue the next field is about.
    pub const SELECT: u64 = 0;
    /// le16: MSI-X vector of kicks of that queue, or [`NO_VECTOR`](super::NO_VECTOR).
    pub const MSIX_VECTOR: u64 = 2;
    /// Length of the structure.
    pub const SIZE: usize = 4;
}
