//! Sends the `.npy` files of a folder.

use std::fs::{self, File};
use std::io::Read;
use std::path::PathBuf;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::Error;
use crate::npy;
use crate::schema::Chunk;
use crate::schema::tensor_transfer_client::TensorTransferClient;

const CHUNK_BYTES: usize = 32 * 1024;
const QUEUED_CHUNKS: usize = 64;

pub async fn push(folder: &str, address: &str) -> Result<(), Error> {
    let mut files: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "npy") {
            files.push(path);
        }
    }
    files.sort();

    let mut client = TensorTransferClient::connect(format!("http://{address}")).await?;
    let (sender, receiver) = mpsc::channel(QUEUED_CHUNKS);
    let reader = tokio::task::spawn_blocking(move || read_all(&files, &sender));
    let answer = client.push(ReceiverStream::new(receiver)).await;
    reader.await??;
    let summary = answer?.into_inner();
    println!("{} tensors, {} bytes", summary.tensors, summary.bytes);
    Ok(())
}

fn read_all(files: &[PathBuf], sender: &mpsc::Sender<Chunk>) -> Result<(), Error> {
    for path in files {
        let name = path.file_stem().ok_or("no file name")?;
        let name = name.to_str().ok_or("file name is not UTF-8")?;
        let mut file = File::open(path)?;
        let header = npy::read_header(&mut file)?;
        let mut offset = 0;
        loop {
            let mut data = vec![0; CHUNK_BYTES];
            let length = read_full(&mut file, &mut data)?;
            data.truncate(length);
            // An empty tensor is one empty chunk.
            if length == 0 && offset > 0 {
                break;
            }
            let chunk = Chunk {
                name: name.to_owned(),
                dtype: header.dtype.clone(),
                shape: header.shape.clone(),
                offset,
                data,
            };
            if sender.blocking_send(chunk).is_err() {
                // The call has ended: its own error says why.
                return Ok(());
            }
            offset += length as u64;
            if length < CHUNK_BYTES {
                break;
            }
        }
    }
    Ok(())
}

fn read_full(file: &mut File, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match file.read(&mut buffer[length..])? {
            0 => break,
            count => length += count,
        }
    }
    Ok(length)
}
