//! Serves entropy through the vvu device of this VM: `entropy-vvu BDF`.

use vhost_user_backend::VhostUserDaemon;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

mod device;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let place = std::env::args().nth(1).ok_or("say where to serve")?;
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon = VhostUserDaemon::new("entropy".to_owned(), device::Entropy::open()?, memory)
        .map_err(|error| error.to_string())?;
    vvu::serve_vfio(place.parse()?, |socket| daemon.serve(socket))?;
    Ok(())
}
