//! Writes what arrives into memory-mapped `.npy` files.

use std::collections::HashMap;
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};

use memmap2::MmapMut;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

use crate::Error;
use crate::npy;
use crate::schema::tensor_transfer_server::{TensorTransfer, TensorTransferServer};
use crate::schema::{Chunk, Summary};

pub async fn serve(folder: &str, address: &str) -> Result<(), Error> {
    fs::create_dir_all(folder)?;
    let folder = PathBuf::from(folder);
    Server::builder()
        .add_service(TensorTransferServer::new(Receiver { folder }))
        .serve(address.parse()?)
        .await?;
    Ok(())
}

struct Receiver {
    folder: PathBuf,
}

/// A `.npy` file under construction.
struct Tensor {
    map: MmapMut,
    data_offset: usize,
}

impl Tensor {
    fn create(folder: &Path, chunk: &Chunk) -> Result<Tensor, Error> {
        if chunk.name.contains('/') || chunk.name.starts_with('.') {
            return Err("not a tensor name".into());
        }
        let header = npy::header(&chunk.dtype, &chunk.shape);
        let nbytes = npy::data_bytes(&chunk.dtype, &chunk.shape)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(folder.join(format!("{}.npy", chunk.name)))?;
        file.set_len((header.len() + nbytes) as u64)?;
        // SAFETY: nobody else is expected to change the file while it is written.
        let mut map = unsafe { MmapMut::map_mut(&file)? };
        map[..header.len()].copy_from_slice(&header);
        Ok(Tensor {
            map,
            data_offset: header.len(),
        })
    }

    fn write(&mut self, chunk: &Chunk) -> Result<(), Error> {
        let start = self.data_offset + usize::try_from(chunk.offset)?;
        let place = self
            .map
            .get_mut(start..)
            .and_then(|rest| rest.get_mut(..chunk.data.len()));
        place
            .ok_or("chunk lies outside its tensor")?
            .copy_from_slice(&chunk.data);
        Ok(())
    }
}

#[tonic::async_trait]
impl TensorTransfer for Receiver {
    async fn push(&self, request: Request<Streaming<Chunk>>) -> Result<Response<Summary>, Status> {
        let mut chunks = request.into_inner();
        let mut tensors: HashMap<String, Tensor> = HashMap::new();
        let mut bytes = 0;
        while let Some(chunk) = chunks.message().await? {
            if !tensors.contains_key(&chunk.name) {
                let tensor = Tensor::create(&self.folder, &chunk).map_err(to_status)?;
                tensors.insert(chunk.name.clone(), tensor);
            }
            if let Some(tensor) = tensors.get_mut(&chunk.name) {
                tensor.write(&chunk).map_err(to_status)?;
            }
            bytes += chunk.data.len() as u64;
        }
        for tensor in tensors.values() {
            tensor.map.flush()?;
        }
        Ok(Response::new(Summary {
            tensors: tensors.len() as u64,
            bytes,
        }))
    }
}

fn to_status(error: Error) -> Status {
    Status::internal(error.to_string())
}
