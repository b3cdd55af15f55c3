//! The express device: a second PCI device next to the vvu device, through which the guest signals the front-end's
//! call eventfds without the proxy.
//!
//! It is QEMU's `ivshmem-doorbell`. QEMU asks a server for eventfds of *peers* and lets the guest signal them with one
//! register write (QEMU, "Device Specification for Inter-VM shared memory device"). Here the proxy is the server, each
//! call eventfd is a peer, and the shared memory is one page that tells the guest driver which peer a queue has.

/// PCI vendor id of the device.
pub const VENDOR_ID: u16 = 0x1af4;
/// PCI device id of the device.
pub const DEVICE_ID: u16 = 0x1110;

/// BAR of the registers.
pub const REGISTER_BAR: u8 = 0;
/// Register of `REGISTER_BAR`, le32: a write signals vector `value & 0xffff` of peer `value >> 16`.
pub const DOORBELL: u64 = 12;
/// BAR of the shared page.
pub const PAGE_BAR: u8 = 2;

/// Vector of a peer that is the queue's call eventfd.
const CALL_VECTOR: u32 = 0;
/// Vector of a peer that is an eventfd of the proxy. It becomes known to the VMM after vector 0 does.
const CONFIRM_VECTOR: u32 = 1;
/// Eventfds of a peer, and so the least that the device's `vectors` property may be.
pub const VECTORS: usize = 2;

/// A peer. QEMU's own device is peer 0, and a number from 0x8000 on overflows QEMU's arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId(u16);

impl PeerId {
    /// The first peer that is not QEMU's own device.
    pub const FIRST: Self = Self(1);
    /// The last peer.
    pub const LAST: Self = Self(0x7fff);

    /// Returns the next number, `None` after the last one.
    #[must_use]
    pub fn next(self) -> Option<Self> {
        Self::new(self.0.checked_add(1)?)
    }

    /// Returns the peer with number `id`, `None` if there cannot be such a peer.
    #[must_use]
    pub fn new(id: u16) -> Option<Self> {
        (Self::FIRST.0..=Self::LAST.0).contains(&id).then_some(Self(id))
    }

    /// Returns the number.
    #[must_use]
    pub fn get(self) -> u16 {
        self.0
    }

    /// Returns what the guest writes to [`DOORBELL`] to signal the call eventfd.
    #[must_use]
    pub fn call(self) -> u32 {
        u32::from(self.0) << 16 | CALL_VECTOR
    }

    /// Returns what the guest writes to [`DOORBELL`] to learn whether the VMM knows the call eventfd.
    #[must_use]
    pub fn confirm(self) -> u32 {
        u32::from(self.0) << 16 | CONFIRM_VECTOR
    }

    /// Returns the peer whose [`call`](Self::call) is `value`, `None` if there is none.
    #[must_use]
    pub fn from_call(value: u32) -> Option<Self> {
        let id = Self::new(u16::try_from(value >> 16).ok()?)?;
        (id.call() == value).then_some(id)
    }
}

/// A message of the server, the only direction there is: le64, signed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServerMessage {
    /// The protocol's version, 0. The first message.
    Version,
    /// The peer that the device itself is: always 0. The second message.
    OwnId,
    /// The shared page; its file descriptor comes along. The last message that the device waits for.
    Page,
    /// With a file descriptor, the next vector of a peer; without one, the peer disconnected.
    Peer(PeerId),
}

impl ServerMessage {
    /// Bytes of a message.
    pub const SIZE: usize = 8;

    /// Returns the message as it is on the wire.
    #[must_use]
    pub fn to_bytes(self) -> [u8; Self::SIZE] {
        let number: i64 = match self {
            Self::Version | Self::OwnId => 0,
            Self::Page => -1,
            Self::Peer(id) => id.get().into(),
        };
        number.to_le_bytes()
    }
}

/// Layout of the shared page, little-endian. The proxy alone writes it, and trusts nothing in it; the guest trusts
/// nothing in it but to choose between two ways to signal the same sibling.
pub mod page {
    use super::PeerId;
    use crate::spec::addr::QueueIndex;

    /// Bytes of the page.
    pub const SIZE: usize = 4096;
    /// The first eight bytes.
    pub const MAGIC: [u8; 8] = *b"vvu-call";
    /// Version of this layout.
    pub const VERSION: u32 = 1;
    /// Bytes of the header.
    pub const HEADER_SIZE: usize = 32;
    /// Offset of the entry of queue 0. An entry has two le32: `call`, `registered`.
    const ENTRIES: u64 = 64;
    /// Bytes of an entry.
    const ENTRY_SIZE: u64 = 8;
    /// Most queues that have an entry.
    pub const QUEUES_MAX: u16 = 504;

    /// The part that does not change while the proxy runs: magic, le32 version, le32 number of queues, uuid.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Header {
        /// Queues that have an entry.
        pub queues: u16,
        /// The uuid of the vvu device that the page belongs to.
        pub uuid: [u8; 16],
    }

    impl Header {
        /// Returns the header as it is in the page.
        #[must_use]
        pub fn to_bytes(&self) -> [u8; HEADER_SIZE] {
            let mut bytes = [0; HEADER_SIZE];
            bytes[..8].copy_from_slice(&MAGIC);
            bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
            bytes[12..16].copy_from_slice(&u32::from(self.queues).to_le_bytes());
            bytes[16..].copy_from_slice(&self.uuid);
            bytes
        }

        /// Reads the start of a page. Returns `None` for a page of another kind or version, such as that of an
        /// `ivshmem-doorbell` for another purpose.
        #[must_use]
        pub fn parse(bytes: &[u8; HEADER_SIZE]) -> Option<Self> {
            let (magic, rest) = bytes.split_first_chunk::<8>()?;
            let (version, rest) = rest.split_first_chunk()?;
            let (queues, rest) = rest.split_first_chunk()?;
            let queues = u16::try_from(u32::from_le_bytes(*queues)).ok()?;
            let known = *magic == MAGIC && u32::from_le_bytes(*version) == VERSION && queues <= QUEUES_MAX;
            known.then_some(Self { queues, uuid: *rest.first_chunk()? })
        }
    }

    /// The entry of a queue.
    ///
    /// A reader loads `call` first. If `registered` is the same then, the peer's call eventfd was the queue's newest when
    /// `call` was loaded, and the VMM knew it when `registered` was loaded.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Entry {
        /// The peer of the queue's newest call eventfd, if there is one.
        pub call: Option<PeerId>,
        /// The same peer, once the VMM knows its call eventfd.
        pub registered: Option<PeerId>,
    }

    impl Entry {
        /// Returns the offset of `call` of a queue.
        #[must_use]
        pub fn call_offset(queue: QueueIndex) -> u64 {
            ENTRIES + ENTRY_SIZE * u64::from(queue.0)
        }

        /// Returns the offset of `registered` of a queue.
        #[must_use]
        pub fn registered_offset(queue: QueueIndex) -> u64 {
            Self::call_offset(queue) + 4
        }

        /// Returns `call` and `registered` as they are in the page: what to write to the doorbell, or 0.
        #[must_use]
        pub fn to_values(self) -> [u32; 2] {
            [self.call, self.registered].map(|peer| peer.map_or(0, PeerId::call))
        }

        /// Reads `call` and `registered`. A value that cannot be counts as 0.
        #[must_use]
        pub fn from_values([call, registered]: [u32; 2]) -> Self {
            Self { call: PeerId::from_call(call), registered: PeerId::from_call(registered) }
        }

        /// Returns the peer that signals the queue's newest call eventfd, if there is one that the VMM knows.
        #[must_use]
        pub fn usable(self) -> Option<PeerId> {
            self.call.filter(|_| self.call == self.registered)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::page::{Entry, Header};
    use super::*;
    use crate::spec::addr::QueueIndex;
    use proptest::prelude::*;

    fn peer(id: u16) -> PeerId {
        PeerId::new(id).expect("a peer")
    }

    #[test]
    fn messages_are_signed_little_endian_numbers() {
        assert_eq!(ServerMessage::Version.to_bytes(), [0; 8]);
        assert_eq!(ServerMessage::OwnId.to_bytes(), [0; 8]);
        assert_eq!(ServerMessage::Page.to_bytes(), [0xff; 8]);
        assert_eq!(ServerMessage::Peer(peer(0x1234)).to_bytes(), [0x34, 0x12, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn the_guest_writes_peer_and_vector() {
        assert_eq!(peer(0x7fff).call(), 0x7fff_0000);
        assert_eq!(peer(0x7fff).confirm(), 0x7fff_0001);
        assert_eq!(PeerId::from_call(0x0002_0000), Some(peer(2)));
        for value in [0, 1, 0x0002_0001, 0x8000_0000, u32::MAX] {
            assert_eq!(PeerId::from_call(value), None, "{value:#x}");
        }
    }

    #[test]
    fn peers_are_counted_from_1_to_the_largest_that_is_safe() {
        let all: Vec<_> =
            std::iter::successors(Some(PeerId::FIRST), |id| id.next()).map(PeerId::get).collect();
        assert_eq!((all.first(), all.last(), all.len()), (Some(&1), Some(&0x7fff), 0x7fff));
        assert_eq!((PeerId::new(0), PeerId::new(0x8000)), (None, None));
    }

    #[test]
    fn the_header_has_its_golden_bytes() {
        let header = Header { queues: 16, uuid: *b"0123456789abcdef" };
        let bytes = header.to_bytes();
        assert_eq!(&bytes, b"vvu-call\x01\0\0\0\x10\0\0\x000123456789abcdef");
        assert_eq!(Header::parse(&bytes), Some(header));
    }

    #[test]
    fn pages_of_another_kind_are_not_taken() {
        let good = Header { queues: 16, uuid: [7; 16] }.to_bytes();
        assert_eq!(Header::parse(&[0; 32]), None);
        assert_eq!(Header::parse(&[0xff; 32]), None);
        for (at, byte) in [(0, b'V'), (8, 2), (11, 1), (13, 2), (15, 1)] {
            let mut bytes = good;
            bytes[at] = byte;
            assert_eq!(Header::parse(&bytes), None, "byte {at} is {byte}");
        }
    }

    #[test]
    fn entries_follow_the_header_and_end_in_the_page() {
        assert_eq!(Entry::call_offset(QueueIndex(0)), 64);
        assert_eq!(Entry::registered_offset(QueueIndex(1)), 76);
        let last = Entry::registered_offset(QueueIndex(page::QUEUES_MAX - 1));
        assert_eq!(last + 4, page::SIZE as u64);
    }

    #[test]
    fn an_entry_is_usable_when_its_newest_peer_is_registered() {
        let entry = |call, registered| Entry::from_values([call, registered]);
        assert_eq!(entry(0x0003_0000, 0x0003_0000).usable(), Some(peer(3)));
        assert_eq!(entry(0x0003_0000, 0x0002_0000).usable(), None);
        assert_eq!(entry(0, 0x0003_0000).usable(), None);
        assert_eq!(entry(0, 0).usable(), None);
        // A device that is gone reads as all ones.
        assert_eq!(entry(u32::MAX, u32::MAX).usable(), None);
    }

    proptest! {
        #[test]
        fn headers_and_entries_survive_the_page(queues in 0..=page::QUEUES_MAX, uuid: [u8; 16], ids: [Option<u16>; 2]) {
            let header = Header { queues, uuid };
            prop_assert_eq!(Header::parse(&header.to_bytes()), Some(header));
            let [call, registered] = ids.map(|id| id.and_then(PeerId::new));
            let entry = Entry { call, registered };
            prop_assert_eq!(Entry::from_values(entry.to_values()), entry);
        }

        #[test]
        fn any_page_is_read_without_panic(bytes: [u8; 32], values: [u32; 2]) {
            let _ = Header::parse(&bytes);
            let entry = Entry::from_values(values);
            if let Some(peer) = entry.usable() {
                prop_assert_eq!([peer.call(); 2], values);
            }
        }
    }
}
