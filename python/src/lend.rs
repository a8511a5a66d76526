//! Memory of numpy arrays as bytes, without a copy. The only file with `unsafe`.

use bytes::Bytes;
use pyo3::{exceptions::PyValueError, prelude::*, types::PyDict};

/// The bytes of a flat `uint8` array, lent for as long as anything refers to them. The last
/// to let go may be any thread: what it drops is handed back to Python by the next thread
/// that holds the GIL.
///
/// # Errors
/// The object is not a contiguous one-dimensional array of `uint8`.
pub(crate) fn lend(array: &Bound<'_, PyAny>) -> PyResult<Bytes> {
    let interface = array.getattr("__array_interface__")?;
    let interface = interface.cast::<PyDict>()?;
    let item = |key: &str| {
        let missing = || PyValueError::new_err(format!("an array without {key:?}"));
        interface.get_item(key)?.ok_or_else(missing)
    };
    let typestr: String = item("typestr")?.extract()?;
    let (len,): (usize,) = item("shape")?.extract()?;
    let (address, _read_only): (usize, bool) = item("data")?.extract()?;
    let strides = interface.get_item("strides")?;
    if typestr != "|u1" || strides.is_some_and(|strides| !strides.is_none()) {
        return Err(PyValueError::new_err("not a contiguous array of uint8"));
    }
    if len == 0 {
        return Ok(Bytes::new());
    }
    if address == 0 || isize::try_from(len).is_err() {
        return Err(PyValueError::new_err("an array without memory"));
    }
    Ok(Bytes::from_owner(Lent {
        address,
        len,
        _array: array.clone().unbind(),
    }))
}

/// Memory that an array keeps alive.
struct Lent {
    address: usize,
    len: usize,
    /// Keeps the memory where it is, with one exception: `ndarray.resize` refuses while there
    /// is a view of the array, as there always is here, but `resize(refcheck=False)` frees or
    /// moves it all the same. That is a use after free which Python code can bring about and
    /// nothing here can find out; the README forbids it.
    _array: Py<PyAny>,
}

impl AsRef<[u8]> for Lent {
    #[expect(
        unsafe_code,
        reason = "the array says where its memory is and keeps it"
    )]
    fn as_ref(&self) -> &[u8] {
        // SAFETY: numpy states address and length of memory that is initialised and lives as
        // long as `_array`, unless its owner is resized with `refcheck=False`, which is the
        // user's not to do (see `_array`). It may be written while it is lent: that is the
        // user's to avoid, and with a sum it is found out. Nothing here depends on the bytes
        // being the same twice: they are summed, copied, compressed by a codec that expects
        // anything, and sent.
        unsafe { std::slice::from_raw_parts(self.address as *const u8, self.len) }
    }
}
