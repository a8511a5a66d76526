//! Floor 0: bytes in, bytes out. Element types, the headers of `.npy` and
//! `.safetensors`, checksums and codecs. Nothing here touches a file, a socket or a clock.

pub mod checksum;
pub mod codec;
pub mod dtype;
pub mod npy;
pub mod safetensors;

pub use dtype::Dtype;
