//! A virtio entropy device (virtio 1.2, 5.4) on the `vhost-user-backend` crate. Nothing here depends on VVU.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex};

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackendMut, VringRwLock, VringT};
use virtio_queue::{Error, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// Most bytes that one request gets, however many it asks for.
const REQUEST_MAX: usize = 64 << 10;

/// Fills buffers with random bytes.
pub(crate) struct Entropy {
    source: File,
    memory: Memory,
}

impl Entropy {
    /// Opens the source of random bytes.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn open() -> io::Result<Arc<Mutex<Self>>> {
        let memory = Memory::new(GuestMemoryMmap::new());
        Ok(Arc::new(Mutex::new(Self { source: File::open("/dev/urandom")?, memory })))
    }

    fn fill_all(&mut self, vring: &VringRwLock) -> Result<(), Error> {
        let memory = self.memory.memory();
        let mut state = vring.get_mut();
        let chains: Vec<_> = state.get_queue_mut().iter(memory.clone())?.collect();
        for chain in chains {
            let (head, mut filled) = (chain.head_index(), 0);
            for buffer in chain.writable() {
                let wanted = usize::try_from(buffer.len()).unwrap_or(REQUEST_MAX).min(REQUEST_MAX - filled);
                // At an address outside of memory, which is the driver's fault, the request ends.
                match memory.read_volatile_from(buffer.addr(), &mut self.source, wanted) {
                    Ok(got) => filled += got,
                    Err(_) => break,
                }
            }
            let filled = u32::try_from(filled).unwrap_or(0);
            state.get_queue_mut().add_used(&*memory, head, filled)?;
        }
        Ok(())
    }
}

impl VhostUserBackendMut for Entropy {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        1
    }

    fn max_queue_size(&self) -> usize {
        256
    }

    fn features(&self) -> u64 {
        const VERSION_1: u64 = 1 << 32;
        VERSION_1 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&mut self, _enabled: bool) {}

    fn update_memory(&mut self, memory: Memory) -> io::Result<()> {
        self.memory = memory;
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(
        &mut self,
        queue: u16,
        _events: EventSet,
        vrings: &[VringRwLock],
        _thread: usize,
    ) -> io::Result<()> {
        let vring = vrings.get(usize::from(queue)).ok_or(io::ErrorKind::NotFound)?;
        self.fill_all(vring).map_err(io::Error::other)?;
        vring.signal_used_queue()
    }
}
