//! The block back-end, served in a thread of the test.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use vvu::backend::ServeError;
use vvu::backend::block::{BlockBackend, BlockOptions};
use vvu::event::StopToken;
use vvu::listening_socket::ListeningSocket as Socket;

use super::{Driver, Setup, SiblingMemory, Task, disk};

/// A back-end that serves a disk in a thread.
pub struct Backend {
    pub dir: tempfile::TempDir,
    pub socket: PathBuf,
    pub disk: PathBuf,
    options: BlockOptions,
    pub stop: StopToken,
    task: Option<Task<Result<(), ServeError>>>,
}

impl Backend {
    pub fn start(content: &[u8], adjust: impl FnOnce(&mut BlockOptions)) -> Self {
        let (dir, disk) = disk(content).expect("disk");
        let mut options = BlockOptions { queues: 4, ..BlockOptions::new(&disk) };
        adjust(&mut options);
        let path = dir.path().join("s");
        let (stop, task) = Self::serve(&options, &path);
        Self { dir, socket: path, disk, options, stop, task: Some(task) }
    }

    fn serve(options: &BlockOptions, path: &Path) -> (StopToken, Task<Result<(), ServeError>>) {
        let block = BlockBackend::open(options).expect("disk");
        let socket = Socket::bind(path).expect("socket");
        let stop = StopToken::new().expect("stop");
        let handle = stop.clone();
        let task = Task::spawn("back-end", move || block.serve(socket.listener(), &handle));
        (stop, task)
    }

    /// Ends the back-end and starts another one in its place.
    pub fn restart(&mut self) {
        self.finish();
        let (stop, task) = Self::serve(&self.options, &self.socket);
        (self.stop, self.task) = (stop, Some(task));
    }

    pub fn connect(&self, memory: &Arc<SiblingMemory>, setup: Setup) -> Driver {
        Driver::connect(&self.socket, memory, setup).expect("connection")
    }

    pub fn content(&self) -> Vec<u8> {
        std::fs::read(&self.disk).expect("disk")
    }

    pub fn end(mut self) {
        self.finish();
    }

    fn finish(&mut self) {
        self.stop.stop();
        self.task.take().expect("running").join().expect("served");
        assert!(!self.socket.exists(), "the socket goes with its back-end");
    }
}
