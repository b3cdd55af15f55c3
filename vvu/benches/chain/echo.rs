//! A back-end that answers each kick with a call and touches no ring.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VringT};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventNotifier};
use vvu::backend::{ExitEvents, ServeError, Stop, Vring, serve};
use vvu::listening_socket::ListeningSocket;

use crate::common::Task;

/// When the last kick came and the last call went.
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

struct Device {
    stamps: Arc<Stamps>,
    exit_events: ExitEvents,
}

/// The back-end, served in a thread.
pub struct Echo {
    _dir: tempfile::TempDir,
    pub socket: PathBuf,
    pub stamps: Arc<Stamps>,
    stop: Stop,
    task: Task<Result<(), ServeError>>,
}

impl Echo {
    pub fn start() -> Self {
        let dir = tempfile::tempdir().expect("directory");
        let socket = dir.path().join("echo");
        let stop = Stop::new().expect("stop");
        let zero = AtomicU64::default;
        let stamps = Arc::new(Stamps { start: Instant::now(), kicked: zero(), called: zero() });
        let task = Self::serve(&socket, &stop, &stamps);
        Self { _dir: dir, socket, stamps, stop, task }
    }

    fn serve(socket: &Path, stop: &Stop, stamps: &Arc<Stamps>) -> Task<Result<(), ServeError>> {
        let socket = ListeningSocket::bind(socket).expect("socket");
        let (stop, stamps) = (stop.clone(), stamps.clone());
        let device = move || Device { stamps: stamps.clone(), exit_events: ExitEvents::default() };
        Task::spawn("echo", move || serve(socket.listener(), &stop, |_| Ok(device())))
    }

    pub fn end(self) {
        self.stop.stop();
        self.task.join().expect("served");
    }
}

impl VhostUserBackend for Device {
    type Bitmap = ();
    type Vring = Vring;

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

    fn update_memory(&self, _memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        self.exit_events.create()
    }

    fn handle_event(&self, _event: u16, _set: EventSet, vrings: &[Vring], _thread: usize) -> io::Result<()> {
        self.stamps.now(&self.stamps.kicked);
        let vring = vrings.first().expect("one queue");
        self.stamps.now(&self.stamps.called);
        vring.signal_used_queue()
    }
}
