//! The scenarios of the end-to-end harness, one JSON file each.
