//! A VMM with an express device: handles the messages of the server in a thread, as QEMU does in its main loop.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags};
use vm_memory::{MmapRegion, VolatileMemory};
use vvu::StopToken;
use vvu::event::{Event, wait_any};
use vvu::pci::{BarFile, DeviceError, DmaBuffer, Doorbell, DoorbellValue, PciDevice};
use vvu::spec::express::{DOORBELL, PAGE_BAR, REGISTER_BAR};
use vvu::spec::pci::Region;

use super::ivshmem::Ivshmem;

/// Bytes of the register BAR.
const REGISTER_BAR_SIZE: u64 = 256;

/// The VMM. Dropping it is its end.
pub struct Vmm {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    watcher: Option<JoinHandle<()>>,
}

/// The device as the guest's driver has it.
pub struct ExpressDevice(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    changed: Event,
    stop: StopToken,
}

struct State {
    device: Ivshmem,
    /// Connection to the server, until the VMM hangs up.
    socket: Option<UnixStream>,
    paused: bool,
    command: [u8; 2],
    doorbells: Vec<(u32, Event)>,
    rung: u64,
    /// The page with the register, if the guest can map it.
    register: Option<Arc<MmapRegion>>,
    /// Stores to the mapped register.
    stored: u64,
    /// Accesses of the guest fail.
    failed: bool,
}

impl State {
    fn access(&self) -> Result<(), DeviceError> {
        let gone = || std::io::Error::from_raw_os_error(rustix::io::Errno::NODEV.raw_os_error());
        if self.failed {
            Err(DeviceError::Io { what: "access the device".to_owned(), source: gone() })
        } else {
            Ok(())
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.signal();
    }

    fn run(&self) {
        loop {
            let fds: Vec<OwnedFd> = {
                let state = self.lock();
                let socket = state.socket.as_ref().filter(|_| !state.paused).map(AsFd::as_fd);
                let events = state.doorbells.iter().map(|(_, event)| event.as_fd());
                let all = [self.stop.as_fd(), self.changed.as_fd()].into_iter().chain(socket).chain(events);
                all.map(|fd| fd.try_clone_to_owned().expect("dup")).collect()
            };
            let mut fds: Vec<_> = fds.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
            wait_any(&mut fds, None).expect("wait");
            if self.stop.is_stopped() {
                return;
            }
            self.changed.drain();
            let mut state = self.lock();
            if !state.paused && state.socket.is_some() && !state.device.handle_all() {
                state.socket = None;
            }
            let State { doorbells, device, rung, failed, .. } = &mut *state;
            for (value, event) in doorbells {
                if event.drain() > 0 && !*failed {
                    device.ring(*value);
                    *rung += 1;
                }
            }
        }
    }
}

impl Vmm {
    /// Connects to the server at `path`, and waits until it has sent its page.
    pub fn connect(path: &Path) -> Self {
        let socket = UnixStream::connect(path).expect("a server");
        let device = Ivshmem::new(socket.try_clone().expect("dup"));
        let state = State {
            device,
            socket: Some(socket),
            paused: false,
            command: [0; 2],
            doorbells: Vec::new(),
            rung: 0,
            register: None,
            stored: 0,
            failed: false,
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            changed: Event::new().expect("event"),
            stop: StopToken::new().expect("stop"),
        });
        let thread = std::thread::spawn({
            let shared = shared.clone();
            move || shared.run()
        });
        let vmm = Self { shared, thread: Some(thread), watcher: None };
        super::wait_until("the server has sent its page", || {
            vmm.shared.lock().device.is_ready().then_some(())
        });
        vmm
    }

    /// Lets the guest map the doorbell register. A thread looks at it all the time, as the CPU traps each store; if one
    /// store follows another too fast, it sees the last one only.
    pub fn map_register(&mut self) {
        let register = Arc::new(MmapRegion::new(4096).expect("memory"));
        self.shared.lock().register = Some(register.clone());
        let shared = self.shared.clone();
        self.watcher = Some(std::thread::spawn(move || {
            let at = usize::try_from(DOORBELL).expect("small");
            let slice = register.as_volatile_slice();
            let register = slice.get_atomic_ref::<AtomicU32>(at).expect("a register");
            while !shared.stop.is_stopped() {
                match register.swap(0, Ordering::SeqCst) {
                    0 => std::thread::yield_now(),
                    value => {
                        let mut state = shared.lock();
                        state.device.ring(u32::from_le(value));
                        state.stored += 1;
                    }
                }
            }
        }));
    }

    /// Notifications by a store to the mapped register.
    pub fn stored(&self) -> u64 {
        self.shared.lock().stored
    }

    pub fn device(&self) -> Box<dyn PciDevice> {
        Box::new(ExpressDevice(self.shared.clone()))
    }

    /// Stops to handle messages of the server, or goes on.
    pub fn set_paused(&self, paused: bool) {
        self.shared.change(|state| state.paused = paused);
    }

    /// Closes the connection to the server. The device keeps what it knows.
    pub fn hang_up(&self) {
        self.shared.change(|state| {
            if let Some(socket) = state.socket.take() {
                socket.shutdown(std::net::Shutdown::Both).expect("shutdown");
            }
        });
    }

    /// From now on, accesses of the guest fail, and what it rings signals nothing.
    pub fn fail(&self) {
        self.shared.change(|state| state.failed = true);
    }

    /// Notifications that went through the device.
    pub fn rung(&self) -> u64 {
        self.shared.lock().rung
    }

    /// The peers that are connected, and all that ever were.
    pub fn peers(&self) -> (Vec<i64>, usize) {
        self.shared.lock().device.peers()
    }

    /// Doorbells that eventfds are bound to.
    pub fn bound(&self) -> usize {
        self.shared.lock().doorbells.len()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.hang_up();
        self.shared.stop.stop();
        for thread in [self.thread.take(), self.watcher.take()].into_iter().flatten() {
            thread.join().expect("the VMM must not crash");
        }
    }
}

fn value(doorbell: Doorbell) -> u32 {
    assert_eq!((doorbell.bar, doorbell.offset), (REGISTER_BAR, DOORBELL));
    match doorbell.value {
        DoorbellValue::Le32(value) => value,
        DoorbellValue::Le16(_) => panic!("the register has 32 bits"),
    }
}

impl PciDevice for ExpressDevice {
    fn region_size(&self, region: Region) -> u64 {
        match region {
            Region::Config => 256,
            Region::Bar(REGISTER_BAR) => REGISTER_BAR_SIZE,
            Region::Bar(PAGE_BAR) => 4096,
            Region::Bar(_) => 0,
        }
    }

    fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> Result<(), DeviceError> {
        let state = self.0.lock();
        state.access()?;
        match (region, offset) {
            (Region::Config, 4) => data.copy_from_slice(&state.command),
            (Region::Bar(PAGE_BAR), _) if state.command[0] & 2 != 0 => state.device.read(offset, data),
            _ => data.fill(0xff),
        }
        Ok(())
    }

    fn write(&self, region: Region, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        let mut state = self.0.lock();
        state.access()?;
        match (region, offset) {
            (Region::Config, 4) => state.command.copy_from_slice(data),
            (Region::Bar(REGISTER_BAR), DOORBELL) => {
                state.device.ring(u32::from_le_bytes(data.try_into().expect("32 bits")));
            }
            other => panic!("a write to {other:?}"),
        }
        Ok(())
    }

    fn bar_file(&self, _bar: u8) -> Result<BarFile, DeviceError> {
        panic!("the driver maps nothing")
    }

    fn map_registers(&self, bar: u8) -> Option<Arc<MmapRegion>> {
        assert_eq!(bar, REGISTER_BAR);
        self.0.lock().register.clone()
    }

    fn allocate_dma(&self, _len: usize) -> Result<DmaBuffer, DeviceError> {
        panic!("the device has no DMA")
    }

    fn enable_msix(&self, _vectors: &[&Event]) -> Result<(), DeviceError> {
        panic!("the driver wants no interrupts")
    }

    fn bind_doorbell(&self, doorbell: Doorbell, event: &Event) -> Result<(), DeviceError> {
        let event = event.try_clone().expect("dup");
        self.0.change(|state| state.doorbells.push((value(doorbell), event)));
        Ok(())
    }

    fn unbind_doorbell(&self, doorbell: Doorbell) -> Result<(), DeviceError> {
        self.0.change(|state| {
            let before = state.doorbells.len();
            state.doorbells.retain(|(bound, _)| *bound != value(doorbell));
            assert_eq!(state.doorbells.len() + 1, before, "{doorbell:?} was bound once");
        });
        Ok(())
    }
}

impl Drop for ExpressDevice {
    fn drop(&mut self) {
        // The kernel does this for a process that closes the device.
        self.0.change(|state| state.doorbells.clear());
    }
}
