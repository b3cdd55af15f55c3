//! The registers of the virtio common configuration (virtio 1.2, 4.1.4.3), and the virtqueues that the
//! driver sets up with them.

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState, QueueT};

use super::copy_at;
use crate::durable::RestoreError;
use crate::spec::virtio::{
    NO_VECTOR, QUEUE_COUNT, QUEUE_SIZE_MAX, RX_QUEUE, TX_QUEUE, common, feature, status,
};

/// A virtqueue and its MSI-X vector.
#[derive(Debug)]
pub(crate) struct VirtQueue {
    pub(crate) queue: Queue,
    pub(crate) vector: u16,
}

impl VirtQueue {
    fn new() -> Self {
        let mut queue = Queue::new(QUEUE_SIZE_MAX).unwrap_or_default();
        queue.set_size(QUEUE_SIZE_MAX);
        Self { queue, vector: NO_VECTOR }
    }

    fn save(&self) -> SavedQueue {
        let QueueState { next_avail, next_used, event_idx_enabled, size, ready, .. } = self.queue.state();
        let QueueState { desc_table, avail_ring, used_ring, .. } = self.queue.state();
        let rings = [desc_table, avail_ring, used_ring];
        let vector = self.vector;
        SavedQueue { next_avail, next_used, event_idx: event_idx_enabled, size, ready, rings, vector }
    }

    fn restore(saved: SavedQueue) -> Result<Self, RestoreError> {
        let SavedQueue { next_avail, next_used, event_idx, size, ready, rings, vector } = saved;
        let [desc_table, avail_ring, used_ring] = rings;
        let state = QueueState {
            max_size: QUEUE_SIZE_MAX,
            next_avail,
            next_used,
            event_idx_enabled: event_idx,
            size,
            ready,
            desc_table,
            avail_ring,
            used_ring,
        };
        let queue = Queue::try_from(state).map_err(|error| RestoreError::Value(error.to_string()))?;
        Ok(Self { queue, vector })
    }
}

/// A virtqueue as it is saved.
#[derive(Debug, Serialize, Deserialize)]
struct SavedQueue {
    next_avail: u16,
    next_used: u16,
    event_idx: bool,
    size: u16,
    ready: bool,
    /// Descriptor table, available ring, used ring.
    rings: [u64; 3],
    vector: u16,
}

/// The registers as they are saved.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct SavedCommonConfig {
    rx: SavedQueue,
    tx: SavedQueue,
    config_vector: u16,
    status: u8,
    feature_selects: [u32; 2],
    driver_features: u64,
    config_generation: u8,
    queue_select: u16,
}

#[derive(Debug)]
pub(crate) struct CommonConfig {
    pub(crate) rx: VirtQueue,
    pub(crate) tx: VirtQueue,
    pub(crate) config_vector: u16,
    /// Number of MSI-X vectors; the driver cannot select a higher one.
    vectors: u16,
    status: u8,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    config_generation: u8,
    queue_select: u16,
}

impl CommonConfig {
    pub(crate) fn new(vectors: u16) -> Self {
        Self {
            rx: VirtQueue::new(),
            tx: VirtQueue::new(),
            config_vector: NO_VECTOR,
            vectors,
            status: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            config_generation: 0,
            queue_select: 0,
        }
    }

    pub(crate) fn reset(&mut self) {
        *self = Self::new(self.vectors);
    }

    pub(crate) fn save(&self) -> SavedCommonConfig {
        SavedCommonConfig {
            rx: self.rx.save(),
            tx: self.tx.save(),
            config_vector: self.config_vector,
            status: self.status,
            feature_selects: [self.device_feature_select, self.driver_feature_select],
            driver_features: self.driver_features,
            config_generation: self.config_generation,
            queue_select: self.queue_select,
        }
    }

    /// Restores what [`save`](Self::save) returned.
    ///
    /// # Errors
    /// [`RestoreError`].
    pub(crate) fn restore(&mut self, saved: SavedCommonConfig) -> Result<(), RestoreError> {
        let [device_feature_select, driver_feature_select] = saved.feature_selects;
        *self = Self {
            rx: VirtQueue::restore(saved.rx)?,
            tx: VirtQueue::restore(saved.tx)?,
            config_vector: saved.config_vector,
            vectors: self.vectors,
            status: saved.status,
            device_feature_select,
            driver_feature_select,
            driver_features: saved.driver_features,
            config_generation: saved.config_generation,
            queue_select: saved.queue_select,
        };
        Ok(())
    }

    /// Whether `DRIVER_OK` is set and `DEVICE_NEEDS_RESET` is not.
    pub(crate) fn driver_ok(&self) -> bool {
        self.status & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK
    }

    /// Sets `DEVICE_NEEDS_RESET`: the device does nothing more until the driver resets it.
    pub(crate) fn set_needs_reset(&mut self) {
        self.status |= status::NEEDS_RESET;
    }

    /// Changes the configuration generation, so that the driver repeats a read of the device configuration
    /// that may have been torn (virtio 1.2, 2.5.1).
    pub(crate) fn bump_generation(&mut self) {
        self.config_generation = self.config_generation.wrapping_add(1);
    }

    fn selected(&self) -> Option<&VirtQueue> {
        match self.queue_select {
            RX_QUEUE => Some(&self.rx),
            TX_QUEUE => Some(&self.tx),
            _ => None,
        }
    }

    fn selected_mut(&mut self) -> Option<&mut VirtQueue> {
        match self.queue_select {
            RX_QUEUE => Some(&mut self.rx),
            TX_QUEUE => Some(&mut self.tx),
            _ => None,
        }
    }

    /// Reads the registers from `offset` on; bytes after the last register are zeroes.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        copy_at(&self.image(), offset, data);
    }

    /// Returns all registers as bytes.
    fn image(&self) -> [u8; 56] {
        let mut image = [0; 56];
        let mut put = |offset: u64, bytes: &[u8]| {
            if let Some(field) =
                usize::try_from(offset).ok().and_then(|at| image.get_mut(at..at + bytes.len()))
            {
                field.copy_from_slice(bytes);
            }
        };
        put(common::DEVICE_FEATURE_SELECT, &self.device_feature_select.to_le_bytes());
        put(common::DEVICE_FEATURE, &half(feature::OFFERED, self.device_feature_select).to_le_bytes());
        put(common::DRIVER_FEATURE_SELECT, &self.driver_feature_select.to_le_bytes());
        put(common::DRIVER_FEATURE, &half(self.driver_features, self.driver_feature_select).to_le_bytes());
        put(common::CONFIG_MSIX_VECTOR, &self.config_vector.to_le_bytes());
        put(common::NUM_QUEUES, &QUEUE_COUNT.to_le_bytes());
        put(common::DEVICE_STATUS, &[self.status]);
        put(common::CONFIG_GENERATION, &[self.config_generation]);
        put(common::QUEUE_SELECT, &self.queue_select.to_le_bytes());
        if let Some(VirtQueue { queue, vector }) = self.selected() {
            put(common::QUEUE_SIZE, &queue.size().to_le_bytes());
            put(common::QUEUE_MSIX_VECTOR, &vector.to_le_bytes());
            put(common::QUEUE_ENABLE, &u16::from(queue.ready()).to_le_bytes());
            put(common::QUEUE_NOTIFY_OFF, &self.queue_select.to_le_bytes());
            put(common::QUEUE_DESC, &queue.desc_table().to_le_bytes());
            put(common::QUEUE_DRIVER, &queue.avail_ring().to_le_bytes());
            put(common::QUEUE_DEVICE, &queue.used_ring().to_le_bytes());
        } else {
            put(common::QUEUE_MSIX_VECTOR, &NO_VECTOR.to_le_bytes());
        }
        image
    }

    /// Writes one field, or one half of a 64-bit field. Other writes are ignored.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        match *data {
            [value] if offset == common::DEVICE_STATUS => self.write_status(value),
            [a, b] => self.write16(offset, u16::from_le_bytes([a, b])),
            [a, b, c, d] => self.write32(offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] if offset >= common::QUEUE_DESC => {
                self.write32(offset, u32::from_le_bytes([a, b, c, d]));
                self.write32(offset + 4, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
    }

    /// Writes the device status. The caller handles a write of 0, which is a reset.
    fn write_status(&mut self, value: u8) {
        let mut value = value | self.status & status::NEEDS_RESET;
        let known = self.driver_features & !feature::OFFERED == 0;
        if !known || self.driver_features & feature::VERSION_1 == 0 {
            value &= !status::FEATURES_OK;
        }
        self.status = value;
    }

    fn write16(&mut self, offset: u64, value: u16) {
        let vector = if value < self.vectors { value } else { NO_VECTOR };
        let event_idx = self.driver_features & feature::EVENT_IDX != 0;
        match offset {
            common::CONFIG_MSIX_VECTOR => self.config_vector = vector,
            common::QUEUE_SELECT => self.queue_select = value,
            _ => {
                let Some(selected) = self.selected_mut() else { return };
                match offset {
                    common::QUEUE_MSIX_VECTOR => selected.vector = vector,
                    common::QUEUE_SIZE if !selected.queue.ready() => selected.queue.set_size(value),
                    common::QUEUE_ENABLE if value == 1 => {
                        selected.queue.set_event_idx(event_idx);
                        selected.queue.set_ready(true);
                    }
                    _ => {}
                }
            }
        }
    }

    fn write32(&mut self, offset: u64, value: u32) {
        match offset {
            common::DEVICE_FEATURE_SELECT => self.device_feature_select = value,
            common::DRIVER_FEATURE_SELECT => self.driver_feature_select = value,
            common::DRIVER_FEATURE if self.status & status::FEATURES_OK == 0 => {
                let (keep, value) = match self.driver_feature_select {
                    0 => (!u64::from(u32::MAX), u64::from(value)),
                    1 => (u64::from(u32::MAX), u64::from(value) << 32),
                    _ => return,
                };
                self.driver_features = self.driver_features & keep | value;
            }
            _ => self.write_ring_address(offset, value),
        }
    }

    fn write_ring_address(&mut self, offset: u64, value: u32) {
        let Some(VirtQueue { queue, .. }) = self.selected_mut() else { return };
        if queue.ready() {
            return;
        }
        let is_high = offset.checked_rem(8) == Some(4);
        let (low, high) = if is_high { (None, Some(value)) } else { (Some(value), None) };
        match offset & !4 {
            common::QUEUE_DESC => queue.set_desc_table_address(low, high),
            common::QUEUE_DRIVER => queue.set_avail_ring_address(low, high),
            common::QUEUE_DEVICE => queue.set_used_ring_address(low, high),
            _ => {}
        }
    }
}

/// Returns the 32 bits of `value` that a feature select register chooses: 0 is the low half, 1 the high
/// half, and all others are zeroes.
fn half(value: u64, select: u32) -> u32 {
    let shifted = match select {
        0 => value,
        1 => value >> 32,
        _ => 0,
    };
    u32::try_from(shifted & u64::from(u32::MAX)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read16(config: &CommonConfig, offset: u64) -> u16 {
        let mut data = [0; 2];
        config.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    fn write_features(config: &mut CommonConfig, features: u64) {
        for (select, value) in [(0u32, half(features, 0)), (1, half(features, 1))] {
            config.write(common::DRIVER_FEATURE_SELECT, &select.to_le_bytes());
            config.write(common::DRIVER_FEATURE, &value.to_le_bytes());
        }
        config.write(common::DEVICE_STATUS, &[status::FEATURES_OK]);
    }

    #[test]
    fn features_ok_only_for_a_modern_driver_that_wants_no_more_than_is_offered() {
        for (features, ok) in [
            (feature::VERSION_1, true),
            (feature::OFFERED, true),
            (feature::ACCESS_PLATFORM, false),
            (feature::OFFERED | 1, false),
            (0, false),
        ] {
            let mut config = CommonConfig::new(19);
            write_features(&mut config, features);
            assert_eq!(config.status & status::FEATURES_OK != 0, ok, "{features:#x}");
        }
    }

    #[test]
    fn a_queue_is_set_up_by_halves_and_then_fixed() {
        let mut config = CommonConfig::new(19);
        config.write(common::QUEUE_SELECT, &1u16.to_le_bytes());
        assert_eq!(read16(&config, common::QUEUE_SIZE), 256);
        config.write(common::QUEUE_SIZE, &64u16.to_le_bytes());
        config.write(common::QUEUE_DESC, &0x5000u32.to_le_bytes());
        config.write(common::QUEUE_DESC + 4, &7u32.to_le_bytes());
        config.write(common::QUEUE_MSIX_VECTOR, &18u16.to_le_bytes());
        config.write(common::QUEUE_ENABLE, &1u16.to_le_bytes());
        config.write(common::QUEUE_SIZE, &128u16.to_le_bytes());
        config.write(common::QUEUE_DESC, &0u32.to_le_bytes());
        assert_eq!(config.tx.queue.desc_table(), 0x7_0000_5000);
        assert_eq!((config.tx.queue.size(), config.tx.vector, config.tx.queue.ready()), (64, 18, true));
        config.write(common::QUEUE_MSIX_VECTOR, &19u16.to_le_bytes());
        assert_eq!(read16(&config, common::QUEUE_MSIX_VECTOR), NO_VECTOR);
        config.write(common::QUEUE_SELECT, &2u16.to_le_bytes());
        assert_eq!(read16(&config, common::QUEUE_SIZE), 0);
    }

    proptest! {
        #[test]
        fn any_access_is_answered(accesses in proptest::collection::vec((0..64u64, proptest::collection::vec(any::<u8>(), 0..10)), 0..50)) {
            let mut config = CommonConfig::new(19);
            for (offset, mut data) in accesses {
                config.write(offset, &data);
                config.read(offset, &mut data);
            }
        }
    }
}
