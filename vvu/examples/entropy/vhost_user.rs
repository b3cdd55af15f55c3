//! Serves entropy on a vhost-user socket: `entropy PATH`.

use vhost_user_backend::VhostUserDaemon;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

mod device;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let place = std::env::args().nth(1).ok_or("say where to serve")?;
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon = VhostUserDaemon::new("entropy".to_owned(), device::Entropy::open()?, memory)
        .map_err(|error| error.to_string())?;
    daemon.serve(place).map_err(|error| error.to_string())?;
    Ok(())
}
