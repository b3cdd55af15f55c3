//! A PCI function in the process of its driver: what a vfio-user client and server make of two processes, for tests
//! that want the function at hand.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::Timespec;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{FileOffset, MmapRegion, Permissions};

use crate::event::{Event, Ready, StopToken, wait_readable};
use crate::pci::{BarFile, DeviceError, DmaBuffer, Doorbell, PciDevice, PciFunction, check_access};
use crate::spec::addr::Iova;
use crate::spec::pci::Region;
use crate::vfio_user::client::Doorbells;
use crate::vfio_user::server::VmmHost;

const PAGE_SIZE: usize = 4096;

/// A function and what it is lent. Clones are the same function.
#[derive(Debug)]
pub(crate) struct LocalDevice<F> {
    shared: Arc<Shared<F>>,
    threads: Arc<Threads>,
}

impl<F> Clone for LocalDevice<F> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared), threads: Arc::clone(&self.threads) }
    }
}

/// The function, and its host.
#[derive(Debug)]
pub(crate) struct State<F> {
    pub(crate) function: F,
    pub(crate) host: VmmHost,
    /// Where BARs begin in their files.
    pub(crate) bar_offset: u64,
    /// Doorbells in the order in which they were bound.
    pub(crate) doorbells: Vec<Doorbell>,
    next_iova: u64,
}

#[derive(Debug)]
struct Shared<F>(Mutex<State<F>>);

impl<F> Shared<F> {
    fn lock(&self) -> MutexGuard<'_, State<F>> {
        // A test that failed while it held the lock still drops its driver.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Carries doorbells to the function, and lets it process its events.
#[derive(Debug)]
struct Threads {
    doorbells: Doorbells,
    stop: StopToken,
    events: Option<JoinHandle<()>>,
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.stop.stop();
        self.events.take().expect("a thread").join().expect("the function must not panic");
    }
}

impl<F: PciFunction + Send + 'static> LocalDevice<F> {
    pub(crate) fn new(function: F) -> Self {
        let host = VmmHost::new(function.vector_count());
        let events = function.events().clone();
        let shared = Arc::new(Shared(Mutex::new(State {
            function,
            host,
            bar_offset: 0,
            doorbells: Vec::new(),
            next_iova: 1 << 32,
        })));
        let stop = StopToken::new().expect("stop");
        let thread = std::thread::spawn({
            let (shared, stop) = (shared.clone(), stop.clone());
            move || {
                let mut ready = Ready::new();
                while wait_readable(&[stop.as_fd(), events.as_fd()], None).expect("wait") != Some(0) {
                    let State { function, host, .. } = &mut *shared.lock();
                    events.wait(Some(&Timespec::default()), &mut ready).expect("look");
                    function.process(host, &ready.function);
                }
            }
        });
        let doorbells = Doorbells::new({
            let shared = shared.clone();
            move |doorbell: Doorbell| {
                let State { function, host, .. } = &mut *shared.lock();
                doorbell.ring(|region, offset, data| function.write(host, region, offset, data));
                Ok(())
            }
        });
        let doorbells = doorbells.expect("a thread");
        Self { shared, threads: Arc::new(Threads { doorbells, stop, events: Some(thread) }) }
    }

    /// The function and its host; while they are locked, nothing else reaches them.
    pub(crate) fn lock(&self) -> MutexGuard<'_, State<F>> {
        self.shared.lock()
    }
}

impl<F: PciFunction + Send + 'static> PciDevice for LocalDevice<F> {
    fn region_size(&self, region: Region) -> u64 {
        self.lock().function.region_size(region)
    }

    fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> Result<(), DeviceError> {
        check_access(region, offset, data.len(), self.region_size(region))?;
        self.lock().function.read(region, offset, data);
        Ok(())
    }

    fn write(&self, region: Region, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        check_access(region, offset, data.len(), self.region_size(region))?;
        let State { function, host, .. } = &mut *self.lock();
        function.write(host, region, offset, data);
        Ok(())
    }

    fn bar_file(&self, bar: u8) -> Result<BarFile, DeviceError> {
        let state = self.lock();
        let mappable = state.function.mappable_bar().filter(|mappable| mappable.bar == bar);
        let file = mappable.expect("a BAR to map").file.try_clone_to_owned().expect("dup").into();
        Ok(BarFile { file, offset: state.bar_offset })
    }

    fn map_registers(&self, _bar: u8) -> Option<Arc<MmapRegion>> {
        None
    }

    fn allocate_dma(&self, len: usize) -> Result<DmaBuffer, DeviceError> {
        let len = len.max(1).next_multiple_of(PAGE_SIZE);
        let size = len as u64;
        let file = memfd_create("dma", MemfdFlags::CLOEXEC).expect("memfd");
        ftruncate(&file, size).expect("size of memfd");
        let mut state = self.lock();
        let iova = Iova(state.next_iova);
        state.next_iova += size + PAGE_SIZE as u64;
        let lent = (file.try_clone().expect("dup"), 0);
        state.host.dma.map(iova, size, Permissions::ReadWrite, Some(lent)).expect("map");
        let memory = MmapRegion::from_file(FileOffset::new(File::from(file), 0), len).expect("mmap");
        Ok(DmaBuffer { memory, iova })
    }

    fn enable_msix(&self, vectors: &[&Event]) -> Result<(), DeviceError> {
        let events = vectors.iter().map(|event| event.as_fd().try_clone_to_owned().expect("dup"));
        let count = u32::try_from(vectors.len()).expect("few vectors");
        let set = self.lock().host.set_vectors(0, count, events.collect());
        set.map_err(|errno| DeviceError::other("set MSI-X vectors", errno))
    }

    fn bind_doorbell(&self, doorbell: Doorbell, event: &Event) -> Result<(), DeviceError> {
        self.lock().doorbells.push(doorbell);
        self.threads.doorbells.bind(doorbell, event)
    }

    fn unbind_doorbell(&self, doorbell: Doorbell) -> Result<(), DeviceError> {
        self.threads.doorbells.unbind(doorbell);
        Ok(())
    }
}
