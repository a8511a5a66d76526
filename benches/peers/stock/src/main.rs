//! The usual first draft of a tensor transfer in tonic: a client stream of 32 KiB chunks, default
//! settings everywhere, a memory-mapped `.npy` file per tensor on the other side. It is a yardstick
//! and stays as it is: no windows, frame sizes, allocator or codec are tuned here, and nothing is
//! made slower than a first draft would be.
//!
//! ```text
//! stock serve FOLDER ADDRESS
//! stock push FOLDER ADDRESS     sends every .npy file of FOLDER
//! ```

mod client;
mod npy;
mod server;

mod schema {
    tonic::include_proto!("stock.v1");
}

type Error = Box<dyn std::error::Error + Send + Sync>;

#[tokio::main]
async fn main() -> Result<(), Error> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        ["serve", folder, address] => server::serve(folder, address).await,
        ["push", folder, address] => client::push(folder, address).await,
        _ => Err("usage: stock serve FOLDER ADDRESS | stock push FOLDER ADDRESS".into()),
    }
}
