//! Virtio registers and bits (virtio 1.2) and the device configuration of virtio-vhost-user.

/// Virtio device id of virtio-vhost-user, as in crosvm. The virtio specification never assigned one.
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
    /// le32: which half [`DEVICE_FEATURE`] shows.
    pub const DEVICE_FEATURE_SELECT: u64 = 0;
    /// le32: half of the features that the device offers.
    pub const DEVICE_FEATURE: u64 = 4;
    /// le32: which half [`DRIVER_FEATURE`] shows.
    pub const DRIVER_FEATURE_SELECT: u64 = 8;
    /// le32: half of the features that the driver accepted.
    pub const DRIVER_FEATURE: u64 = 12;
    /// le16: vector of configuration changes.
    pub const CONFIG_MSIX_VECTOR: u64 = 16;
    /// le16: number of virtqueues.
    pub const NUM_QUEUES: u64 = 18;
    /// Byte: bits of [`status`](super::status).
    pub const DEVICE_STATUS: u64 = 20;
    /// Byte: changes with the device configuration.
    pub const CONFIG_GENERATION: u64 = 21;
    /// le16: virtqueue that the registers below are about.
    pub const QUEUE_SELECT: u64 = 22;
    /// le16: number of descriptors.
    pub const QUEUE_SIZE: u64 = 24;
    /// le16: vector of the virtqueue.
    pub const QUEUE_MSIX_VECTOR: u64 = 26;
    /// le16: 1 while the virtqueue is in use.
    pub const QUEUE_ENABLE: u64 = 28;
    /// le16: index of the notify address.
    pub const QUEUE_NOTIFY_OFF: u64 = 30;
    /// le64, written as two halves: address of the descriptor table.
    pub const QUEUE_DESC: u64 = 32;
    /// le64, written as two halves: address of the available ring.
    pub const QUEUE_DRIVER: u64 = 40;
    /// le64, written as two halves: address of the used ring.
    pub const QUEUE_DEVICE: u64 = 48;
}

/// Device status bits (virtio 1.2, 2.1).
pub mod status {
    /// The driver has found the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The driver knows how to drive the device.
    pub const DRIVER: u8 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 4;
    /// The driver has accepted the features, and the device agrees.
    pub const FEATURES_OK: u8 = 8;
    /// The device needs a reset.
    pub const NEEDS_RESET: u8 = 64;
    /// The driver has given up on the device.
    pub const FAILED: u8 = 128;
}

/// Feature bits that the vvu device offers (virtio 1.2, 6).
pub mod feature {
    /// Bit 29: `used_event` and `avail_event` limit notifications.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// Bit 32: the device complies with virtio 1.0 or later.
    pub const VERSION_1: u64 = 1 << 32;
    /// Bit 33: addresses that the device gets are those of the platform's IOMMU.
    pub const ACCESS_PLATFORM: u64 = 1 << 33;
    /// All features that the vvu device offers.
    pub const OFFERED: u64 = EVENT_IDX | VERSION_1 | ACCESS_PLATFORM;
}

/// ISR status bits (virtio 1.2, 4.1.4.5).
pub mod isr {
    /// The device used a buffer of a virtqueue.
    pub const QUEUE: u8 = 1;
    /// The device configuration changed.
    pub const CONFIG: u8 = 2;
}

/// Device configuration of virtio-vhost-user, little-endian: 24 bytes as in crosvm, and those of the window. A driver that
/// does not know these ignores them.
pub mod device_config {
    /// le32: link status, bits [`BACKEND_UP`] and [`FRONTEND_UP`].
    pub const STATUS: u64 = 0;
    /// le32: most vhost queues that the device can carry.
    pub const MAX_VHOST_QUEUES: u64 = 4;
    /// 16 bytes that identify the device.
    pub const UUID: u64 = 8;
    /// Bytes of the structure as in crosvm, which every device has.
    pub const SIZE: usize = 24;
    /// le64: bytes at the start of the shared memory BAR that the front-end cannot name as memory, and in which the driver
    /// may write. 0 if there are none, so that the BAR's memory cannot be used as a window.
    pub const WINDOW_HEADER: u64 = 24;
    /// le64: bytes of the shared memory BAR that are memory, the header among them; what remains reads as zeroes.
    pub const WINDOW_SIZE: u64 = 32;
    /// Bytes of the structure with the window.
    pub const SIZE_WITH_WINDOW: usize = 40;

    /// Status bit 0, written by the driver: there is a back-end, which waits for a front-end or has one.
    pub const BACKEND_UP: u32 = 1;
    /// Status bit 1, set by the device: a front-end is connected.
    pub const FRONTEND_UP: u32 = 2;
}

/// Offsets in the vector select structure.
pub mod vector_select {
    /// le16: index of the vhost queue that the next field is about.
    pub const SELECT: u64 = 0;
    /// le16: MSI-X vector that kicks of that queue raise, or [`NO_VECTOR`](super::NO_VECTOR).
    pub const MSIX_VECTOR: u64 = 2;
    /// Bytes of the structure.
    pub const SIZE: usize = 4;
}
