//! JSON headers of safetensors files.

use crate::{
    format::Dtype,
    source::safetensors::{Header, parse_header},
};
use std::collections::HashSet;

/// Eight bytes for the length of the data, then the JSON.
///
/// # Panics
/// A property is broken.
pub fn safetensors(data: &[u8]) {
    let Some((len, json)) = data.split_first_chunk::<8>() else {
        return;
    };
    let data_len = u64::from_le_bytes(*len);
    let Ok(header) = parse_header(json, data_len) else {
        return;
    };
    // The shortest tensor: `"":{"dtype":"U8","shape":[],"data_offsets":[0,1]}`.
    assert!(header.tensors.len() <= json.len() / 40);
    let mut at = 0;
    let mut names = HashSet::new();
    for tensor in &header.tensors {
        assert_eq!(tensor.data_offset, at);
        at += tensor.header.byte_len;
        assert!(names.insert(&tensor.header.name), "a name occurs twice");
        tensor.header.check().expect("every header was checked");
    }
    assert_eq!(at, data_len);
    for other in [data_len.wrapping_add(1), data_len.wrapping_sub(1)] {
        assert!(parse_header(json, other).is_err(), "another length fits");
    }
    let again = parse_header(&written(&header), data_len);
    assert_eq!(again.as_ref(), Ok(&header));
}

/// The same header as JSON of our own.
fn written(header: &Header) -> Vec<u8> {
    let mut object = Vec::new();
    if !header.metadata.is_empty() {
        let metadata = serde_json::to_string(&header.metadata).unwrap();
        object.push(format!("\"__metadata__\":{metadata}"));
    }
    for tensor in &header.tensors {
        let entry = &tensor.header;
        let name = serde_json::to_string(&entry.name).unwrap();
        let dtype = name_of(entry.dtype().expect("these entries are tensors"));
        let (start, end) = (tensor.data_offset, tensor.data_offset + entry.byte_len);
        object.push(format!(
            "{name}:{{\"data_offsets\":[{start},{end}],\"shape\":{:?},\"dtype\":\"{dtype}\"}}",
            entry.shape
        ));
    }
    format!("{{{}}}", object.join(",")).into_bytes()
}

fn name_of(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::Bool => "BOOL",
        Dtype::U8 => "U8",
        Dtype::I8 => "I8",
        Dtype::U16 => "U16",
        Dtype::I16 => "I16",
        Dtype::U32 => "U32",
        Dtype::I32 => "I32",
        Dtype::U64 => "U64",
        Dtype::I64 => "I64",
        Dtype::F16 => "F16",
        Dtype::F32 => "F32",
        Dtype::F64 => "F64",
        Dtype::Bf16 => "BF16",
        Dtype::C64 => "C64",
        Dtype::F8E4m3fn => "F8_E4M3",
        Dtype::F8E5m2 => "F8_E5M2",
        Dtype::F8E4m3fnuz => "F8_E4M3FNUZ",
        Dtype::F8E5m2fnuz => "F8_E5M2FNUZ",
        Dtype::F8E8m0fnu => "F8_E8M0",
        Dtype::F4E2m1fn => "F4",
        Dtype::F6E2m3fn => "F6_E2M3",
        Dtype::F6E3m2fn => "F6_E3M2",
        other => panic!("{other} came out of a safetensors header"),
    }
}
