//! The control port: requests in, answers and events out, line by line.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::event::PollFlags;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::termios::{ControlModes, OptionalActions};

use vvu_init::protocol::{self, Event, MAX_ANSWER, MAX_REQUEST, Message, Request};

/// Number of unsent bytes at which no further request is read.
const MAX_UNSENT: usize = MAX_ANSWER;

/// Number of unsent bytes at which processes have to wait with their output.
const MAX_UNSENT_OUTPUT: usize = 256 << 10;

/// A non-blocking line to the host. Nothing here waits: the host may be absent, or late in reading.
pub(crate) struct Control {
    port: OwnedFd,
    /// Bytes of the request that is not complete yet.
    incoming: Vec<u8>,
    /// The rest of a request that is too long is being dropped.
    skipping: bool,
    unsent: Vec<u8>,
}

impl Control {
    /// Opens a serial port and makes it transparent: no echo, no line editing, no flow control.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let port = rustix::fs::open(path, flags, Mode::empty())?;
        let mut modes = rustix::termios::tcgetattr(&port)?;
        modes.make_raw();
        // The host may disconnect and connect again.
        modes.control_modes |= ControlModes::CLOCAL | ControlModes::CREAD;
        modes.control_modes -= ControlModes::HUPCL | ControlModes::CRTSCTS;
        rustix::termios::tcsetattr(&port, OptionalActions::Now, &modes)?;
        Ok(Self::over(port))
    }

    /// Speaks over what is open and non-blocking already.
    pub(crate) fn over(port: OwnedFd) -> Self {
        Self { port, incoming: Vec::new(), skipping: false, unsent: Vec::new() }
    }

    /// The descriptor and the events to poll for.
    pub(crate) fn interest(&self) -> (BorrowedFd<'_>, PollFlags) {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, self.unsent.len() < MAX_UNSENT);
        flags.set(PollFlags::OUT, !self.unsent.is_empty());
        (self.port.as_fd(), flags)
    }

    /// Reads what has arrived and returns the complete requests; for a bad one, the answer.
    pub(crate) fn receive(&mut self) -> io::Result<Vec<Result<Request, Message>>> {
        let mut requests = Vec::new();
        let mut chunk = [0; 4096];
        match rustix::io::read(&self.port, &mut chunk) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                for piece in chunk[..count].split_inclusive(|&byte| byte == b'\n') {
                    requests.extend(self.take(piece));
                }
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(requests)
    }

    /// Takes a piece of a line, its newline last if it has one.
    fn take(&mut self, piece: &[u8]) -> Option<Result<Request, Message>> {
        let (text, complete) = match piece.split_last() {
            Some((b'\n', text)) => (text, true),
            _ => (piece, false),
        };
        if self.skipping {
            self.skipping = !complete;
            return None;
        }
        self.incoming.extend_from_slice(text);
        if self.incoming.len() > MAX_REQUEST {
            self.incoming.clear();
            self.skipping = !complete;
            let error = format!("line over {MAX_REQUEST} bytes");
            return Some(Err(Message::Event(Event::BadRequest { error })));
        }
        if !complete {
            return None;
        }
        let line = std::mem::take(&mut self.incoming);
        let blank = line.iter().all(u8::is_ascii_whitespace);
        (!blank).then(|| Request::parse(&line))
    }

    /// Whether there is room for the output of processes.
    pub(crate) fn has_room(&self) -> bool {
        self.unsent.len() < MAX_UNSENT_OUTPUT
    }

    /// Queues a line; it leaves with [`Control::flush`].
    pub(crate) fn send(&mut self, message: &Message) {
        self.unsent.extend_from_slice(&protocol::line(message));
    }

    /// Sends as much as the port takes now.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        let mut sent = 0;
        let result = loop {
            if sent == self.unsent.len() {
                break Ok(());
            }
            match rustix::io::write(&self.port, &self.unsent[sent..]) {
                Ok(count) => sent += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break Ok(()),
                Err(error) => break Err(error.into()),
            }
        };
        self.unsent.drain(..sent);
        result
    }

    /// Sends the rest and waits until the port has passed it on, however long that takes.
    pub(crate) fn finish(self) -> io::Result<()> {
        rustix::fs::fcntl_setfl(&self.port, OFlags::empty())?;
        let mut port = File::from(self.port);
        port.write_all(&self.unsent)?;
        rustix::termios::tcdrain(&port)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use vvu_init::protocol::{Action, Answer, Empty, Outcome};

    use super::*;

    fn pair() -> (Control, UnixStream) {
        let (guest, host) = UnixStream::pair().expect("socket pair");
        guest.set_nonblocking(true).expect("non-blocking");
        (Control::over(guest.into()), host)
    }

    /// Everything the guest makes of what the host has written.
    fn received(control: &mut Control) -> Vec<Result<Request, Message>> {
        let mut all = Vec::new();
        loop {
            let mut fds = [rustix::event::PollFd::new(&control.port, PollFlags::IN)];
            let now = rustix::event::Timespec::default();
            if rustix::event::poll(&mut fds, Some(&now)).expect("poll") == 0 {
                return all;
            }
            all.extend(control.receive().expect("receive"));
        }
    }

    #[test]
    fn requests_survive_being_cut_anywhere() {
        let (mut control, mut host) = pair();
        let hello = |id| Ok(Request { id, action: Action::Hello(Empty {}) });
        let text = protocol::line(&Request { id: 1, action: Action::Hello(Empty {}) });
        for byte in &text {
            assert_eq!(received(&mut control), []);
            host.write_all(&[*byte]).expect("write");
        }
        assert_eq!(received(&mut control), [hello(1)]);
        host.write_all(b"\r\n{\"id\":2,\"hello\":{}}\r\n{\"id\":3,\"hello\":{}}\n{\"id\"").expect("write");
        assert_eq!(received(&mut control), [hello(2), hello(3)]);
    }

    #[test]
    fn an_overlong_line_is_refused_once_and_the_next_one_counts() {
        let (mut control, mut host) = pair();
        host.write_all(&vec![b'x'; MAX_REQUEST + 10_000]).expect("write");
        host.write_all(b"\n{\"id\":2,\"hello\":{}}\n").expect("write");
        let all = received(&mut control);
        assert!(matches!(&all[0], Err(Message::Event(Event::BadRequest { .. }))), "{all:?}");
        assert_eq!(all[1..], [Ok(Request { id: 2, action: Action::Hello(Empty {}) })]);
    }

    #[test]
    fn a_host_that_does_not_read_stops_requests_not_the_guest() {
        let (mut control, mut host) = pair();
        let answer = Message::Answer(Answer { id: 1, outcome: Outcome::Error("x".repeat(1 << 20)) });
        while control.interest().1.contains(PollFlags::IN) {
            control.send(&answer);
            control.flush().expect("flush");
        }
        let reader = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            host.read_to_end(&mut bytes).expect("read");
            bytes
        });
        control.finish().unwrap_or_else(|error| {
            // A socket has nothing to drain.
            assert_eq!(error.raw_os_error(), Some(Errno::NOTTY.raw_os_error()));
        });
        let bytes = reader.join().expect("reader");
        assert!(bytes.split_inclusive(|&byte| byte == b'\n').all(|line| line == protocol::line(&answer)));
    }
}
