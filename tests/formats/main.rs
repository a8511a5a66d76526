//! What is read of the fixtures is what the libraries that wrote them read: names, types,
//! shapes and a hash of every tensor.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod cases;
mod listed;
