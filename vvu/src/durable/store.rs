//! The saved state, and the ledgers, in one piece of shared memory.

#![expect(unsafe_code, reason = "ledgers are views of the shared memory")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::Ordering;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use super::ledger::{Ledger, Page};

/// A part of the state that is saved as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Section {
    /// The connection of the device VM's VMM, and the eventfds of its vectors.
    Client,
    /// The DMA maps of that VMM.
    Dma,
    /// The device.
    Device,
}

/// A socket that has a ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum SocketSlot {
    /// That of the device VM's VMM.
    Client,
    /// That of the front-end.
    Frontend,
    /// The front-end's channel for requests of the back-end.
    Channel,
    /// That of the VMM of the express device.
    Express,
}

const SECTIONS: usize = 3;
const SOCKETS: usize = 4;
const PAGE: usize = 4096;
/// Bytes of one version of a section. The file has holes where nothing was written.
const VERSION_SIZE: usize = 16 << 20;
const LEDGERS: usize = PAGE;
const VERSIONS: usize = LEDGERS + SOCKETS * size_of::<Page>();
const SIZE: usize = VERSIONS + 2 * SECTIONS * VERSION_SIZE;

/// The sections of the last commit, each as JSON; empty if it was never saved.
#[derive(Debug, Default)]
pub struct SavedState {
    /// [`Section::Client`].
    pub client: Vec<u8>,
    /// [`Section::Dma`].
    pub dma: Vec<u8>,
    /// [`Section::Device`].
    pub device: Vec<u8>,
}

/// The shared memory. It is never unmapped.
///
/// Each section has two versions. The first word of the memory says which of them is the current one, in one bit for
/// each section, and in the bits above it counts the commits. So one store replaces any number of sections.
#[derive(Debug)]
pub struct Store {
    file: File,
    memory: &'static MmapRegion,
}

impl Store {
    /// Makes an empty store.
    ///
    /// # Errors
    /// When the kernel has no memory or no file descriptor left.
    pub fn create() -> io::Result<Self> {
        let file = memfd_create("vvu-state", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&file, SIZE as u64)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Self::open(File::from(file))
    }

    /// Maps a store that [`create`](Self::create) made.
    ///
    /// # Errors
    /// When the file cannot be mapped.
    pub fn open(file: File) -> io::Result<Self> {
        let mapping = MmapRegion::from_file(FileOffset::new(file.try_clone()?, 0), SIZE);
        let memory = Box::leak(Box::new(mapping.map_err(io::Error::other)?));
        Ok(Self { file, memory })
    }

    /// Touches the ledgers: a page that is there cannot be missing when the kernel notes the outcome of a call.
    ///
    /// # Errors
    /// Never, since the ledgers lie in the memory.
    pub fn touch(&self) -> io::Result<()> {
        let ledgers = self.memory.as_volatile_slice();
        let mut bytes = vec![0; VERSIONS];
        ledgers
            .read_slice(&mut bytes, 0)
            .and_then(|()| ledgers.write_slice(&bytes, 0))
            .map_err(io::Error::other)
    }

    /// Makes a second handle.
    ///
    /// # Errors
    /// When there is no file descriptor left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { file: self.file.try_clone()?, memory: self.memory })
    }

    /// The ledger of a socket.
    #[must_use]
    pub fn ledger(&self, slot: SocketSlot) -> Ledger {
        let offset = LEDGERS + slot as usize * size_of::<Page>();
        // SAFETY: the page lies in the mapping, which stays, is aligned to a page and belongs to this socket.
        unsafe { Ledger::new(NonNull::new_unchecked(self.memory.as_ptr().add(offset).cast())) }
    }

    fn word(&self) -> u64 {
        self.memory.as_volatile_slice().load(0, Ordering::SeqCst).unwrap_or(0)
    }

    /// The number of commits.
    #[must_use]
    pub fn commits(&self) -> u64 {
        self.word() >> SECTIONS
    }

    /// Replaces `sections`, all at once.
    ///
    /// # Errors
    /// When a section is too large.
    pub fn commit(&self, sections: &[(Section, Vec<u8>)]) -> io::Result<()> {
        let memory = self.memory.as_volatile_slice();
        let mut word = self.word();
        for (section, bytes) in sections {
            if bytes.len() > VERSION_SIZE - 8 {
                return Err(io::Error::other(format!(
                    "a state of {} bytes is too large to save",
                    bytes.len()
                )));
            }
            word ^= 1 << *section as usize;
            let at = version(word, *section);
            let written =
                memory.write_slice(bytes, at + 8).and_then(|()| memory.write_obj(bytes.len() as u64, at));
            written.map_err(io::Error::other)?;
        }
        let next = word.wrapping_add(1 << SECTIONS);
        memory.store(next, 0, Ordering::SeqCst).map_err(io::Error::other)
    }

    /// Reads what was committed last; `None` if nothing was.
    ///
    /// # Errors
    /// When the memory is damaged.
    pub fn load(&self) -> io::Result<Option<SavedState>> {
        let word = self.word();
        if word == 0 {
            return Ok(None);
        }
        let memory = self.memory.as_volatile_slice();
        let read = |section| {
            let at = version(word, section);
            let len: u64 = memory.read_obj(at).map_err(io::Error::other)?;
            let len = usize::try_from(len).ok().filter(|len| *len <= VERSION_SIZE - 8);
            let mut bytes = vec![0; len.ok_or_else(|| io::Error::other("the length of a section is wrong"))?];
            memory.read_slice(&mut bytes, at + 8).map_err(io::Error::other)?;
            Ok::<_, io::Error>(bytes)
        };
        let (client, dma, device) = (read(Section::Client)?, read(Section::Dma)?, read(Section::Device)?);
        Ok(Some(SavedState { client, dma, device }))
    }
}

/// Offset of the version of `section` that `word` names.
fn version(word: u64, section: Section) -> usize {
    let section = section as usize;
    let which = usize::from(word >> section & 1 != 0);
    VERSIONS + (2 * section + which) * VERSION_SIZE
}

impl AsFd for Store {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_replaces_what_it_names_and_nothing_else() {
        let store = Store::create().expect("store");
        assert!(store.load().expect("readable").is_none());
        store
            .commit(&[(Section::Client, b"one".to_vec()), (Section::Device, b"two".to_vec())])
            .expect("small");
        store.commit(&[(Section::Device, b"three".to_vec())]).expect("small");
        let other = Store::open(store.file.try_clone().expect("dup")).expect("open");
        let SavedState { client, dma, device } = other.load().expect("readable").expect("commits");
        assert_eq!((&*client, &*dma, &*device), (&b"one"[..], &b""[..], &b"three"[..]));
        assert_eq!(other.commits(), 2);
        assert!(store.commit(&[(Section::Dma, vec![0; VERSION_SIZE])]).is_err());
        assert_eq!(store.commits(), 2);
    }
}
