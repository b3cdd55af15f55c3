//! vfio-user messages as stock QEMU speaks them.
