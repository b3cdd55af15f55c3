//! A back-end that answers each kick with a call and touches no ring.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringMutex, VringT};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

use crate::common::Task;

/// The times of the last kick and of the last call.
#[derive(Debug)]
pub struct Stamps {
    start: Instant,
    kicked: AtomicU64,
    called: AtomicU64,
}

impl Stamps {
    fn now(&self, stamp: &AtomicU64) {
        let nanoseconds = u64::try_from(self.start.elapsed().as_nanos()).expect("a short run");
        stamp.store(nanoseconds, Ordering::SeqCst);
    }

    fn at(&self, stamp: &AtomicU64) -> Instant {
        self.start + Duration::from_nanos(stamp.load(Ordering::SeqCst))
    }

    pub fn kicked(&self) -> Instant {
        self.at(&self.kicked)
    }

    pub fn called(&self) -> Instant {
        self.at(&self.called)
    }
}

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

struct Device(Arc<Stamps>);

/// The back-end, served in a thread.
pub struct Echo {
    _dir: tempfile::TempDir,
    pub socket: PathBuf,
    pub stamps: Arc<Stamps>,
    listener: UnixListener,
    task: Task<()>,
}

impl Echo {
    pub fn start() -> Self {
        let dir = tempfile::tempdir().expect("directory");
        let socket = dir.path().join("echo");
        let listener = UnixListener::bind(&socket).expect("socket");
        let zero = AtomicU64::default;
        let stamps = Arc::new(Stamps { start: Instant::now(), kicked: zero(), called: zero() });
        let (accepts, device) = (listener.try_clone().expect("descriptor"), stamps.clone());
        let task = Task::spawn("echo", move || serve(&accepts, &device));
        Self { _dir: dir, socket, stamps, listener, task }
    }

    pub fn end(self) {
        rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both).expect("shutdown");
        self.task.join();
    }
}

/// Serves one front-end after another until the listener is shut down.
fn serve(listener: &UnixListener, stamps: &Arc<Stamps>) {
    loop {
        let memory = Memory::new(GuestMemoryMmap::new());
        let device = Arc::new(Device(stamps.clone()));
        let mut daemon = VhostUserDaemon::new("vhost-user".to_owned(), device, memory).expect("threads");
        let mut listener = Listener::from(listener.try_clone().expect("descriptor"));
        if daemon.start(&mut listener).is_err() {
            return;
        }
        // It ends with the error that the front-end has left.
        let _ = daemon.wait();
    }
}

impl VhostUserBackend for Device {
    type Bitmap = ();
    type Vring = VringMutex<Memory>;

    fn num_queues(&self) -> usize {
        1
    }

    fn max_queue_size(&self) -> usize {
        128
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, _offset: u32, size: u32) -> Vec<u8> {
        vec![0; usize::try_from(size).expect("64 bit")]
    }

    fn update_memory(&self, _memory: Memory) -> io::Result<()> {
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(
        &self,
        _event: u16,
        _set: EventSet,
        vrings: &[Self::Vring],
        _thread: usize,
    ) -> io::Result<()> {
        self.0.now(&self.0.kicked);
        let vring = vrings.first().expect("one queue");
        self.0.now(&self.0.called);
        vring.signal_used_queue()
    }
}
