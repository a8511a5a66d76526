//! Floor 0: bytes in, bytes out. Element types, the `.npy` header, checksums and
//! codecs. Nothing here touches a file, a socket or a clock.

pub mod checksum;
pub mod codec;
pub mod dtype;
pub mod npy;

pub use dtype::Dtype;
