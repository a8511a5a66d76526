//! Element types and what `.npy` calls them.
//!
//! The logical name is the one numpy or ml_dtypes uses, so that Python can say
//! `np.dtype(name)`. The `.npy` description of types that numpy itself does not
//! have is a plain void of the same width (`<V2`, `|V1`, `|V4`): the only
//! spelling that every numpy opens, also with `mmap_mode`.

use std::fmt;

macro_rules! dtypes {
    ($($(#[$doc:meta])* $variant:ident $name:literal $bits:literal $descr:literal;)*) => {
        /// Type of the elements of a tensor.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[non_exhaustive]
        pub enum Dtype {
            $($(#[$doc])* $variant,)*
        }

        impl Dtype {
            /// Every known type.
            pub const ALL: &'static [Dtype] = &[$(Dtype::$variant,)*];

            /// Name as numpy or ml_dtypes spells it.
            pub fn name(self) -> &'static str {
                match self { $(Dtype::$variant => $name,)* }
            }

            /// Width of one element in bits.
            pub fn bits(self) -> u64 {
                match self { $(Dtype::$variant => $bits,)* }
            }

            /// Type code in a `.npy` header, without the byte order mark.
            fn code(self) -> &'static str {
                match self { $(Dtype::$variant => $descr,)* }
            }
        }
    };
}

dtypes! {
    /// One byte, 0 or 1.
    Bool "bool" 8 "b1";
    /// Signed, 8 bits.
    I8 "int8" 8 "i1";
    /// Signed, 16 bits.
    I16 "int16" 16 "i2";
    /// Signed, 32 bits.
    I32 "int32" 32 "i4";
    /// Signed, 64 bits.
    I64 "int64" 64 "i8";
    /// Unsigned, 8 bits.
    U8 "uint8" 8 "u1";
    /// Unsigned, 16 bits.
    U16 "uint16" 16 "u2";
    /// Unsigned, 32 bits.
    U32 "uint32" 32 "u4";
    /// Unsigned, 64 bits.
    U64 "uint64" 64 "u8";
    /// IEEE half.
    F16 "float16" 16 "f2";
    /// IEEE single.
    F32 "float32" 32 "f4";
    /// IEEE double.
    F64 "float64" 64 "f8";
    /// Upper half of an IEEE single.
    Bf16 "bfloat16" 16 "V2";
    /// Two singles.
    C64 "complex64" 64 "c8";
    /// Two doubles.
    C128 "complex128" 128 "c16";
    /// Two halves.
    C32 "complex32" 32 "V4";
    /// 8-bit float, 4 exponent bits, finite.
    F8E4m3fn "float8_e4m3fn" 8 "V1";
    /// 8-bit float, 5 exponent bits.
    F8E5m2 "float8_e5m2" 8 "V1";
    /// 8-bit float, 4 exponent bits, finite, no negative zero.
    F8E4m3fnuz "float8_e4m3fnuz" 8 "V1";
    /// 8-bit float, 5 exponent bits, finite, no negative zero.
    F8E5m2fnuz "float8_e5m2fnuz" 8 "V1";
    /// 8-bit float, 4 exponent bits, bias 11.
    F8E4m3b11fnuz "float8_e4m3b11fnuz" 8 "V1";
    /// 8-bit float, 4 exponent bits, with infinities.
    F8E4m3 "float8_e4m3" 8 "V1";
    /// 8-bit float, 3 exponent bits.
    F8E3m4 "float8_e3m4" 8 "V1";
    /// 8-bit power of two.
    F8E8m0fnu "float8_e8m0fnu" 8 "V1";
    /// 4-bit signed integer, one per byte.
    I4 "int4" 8 "V1";
    /// 4-bit unsigned integer, one per byte.
    U4 "uint4" 8 "V1";
    /// Raw byte of a type that the source does not name (numpy `V1`).
    V1 "V1" 8 "V1";
    /// Raw four bytes of a type that the source does not name (numpy `V4`).
    V4 "V4" 32 "V4";
    /// 4-bit float, two per byte.
    F4E2m1fn "float4_e2m1fn" 4 "u1";
    /// 6-bit float, packed.
    F6E2m3fn "float6_e2m3fn" 6 "u1";
    /// 6-bit float, packed.
    F6E3m2fn "float6_e3m2fn" 6 "u1";
}

impl Dtype {
    /// The type of this name, if known.
    pub fn from_name(name: &str) -> Option<Dtype> {
        Dtype::ALL.iter().copied().find(|d| d.name() == name)
    }

    /// Several elements share a byte: the `.npy` file holds `|u1` of one
    /// dimension and the logical type and shape stand in the manifest only.
    pub fn is_packed(self) -> bool {
        !self.bits().is_multiple_of(8)
    }

    /// Whether big-endian elements can be described in a `.npy` header.
    pub fn can_be_big_endian(self) -> bool {
        self.bits() > 8 && !self.is_packed() && !self.code().starts_with('V')
    }

    /// The `descr` value of a `.npy` header: `<f4`, `>f4`, `|u1`, `<V2`, ….
    pub fn npy_descr(self, big_endian: bool) -> String {
        let mark = match self {
            Dtype::Bf16 => '<',
            _ if self.bits() <= 8 || self.code().starts_with('V') => '|',
            _ if big_endian => '>',
            _ => '<',
        };
        format!("{mark}{}", self.code())
    }

    /// Bytes of an array of this shape, or `None` when the product overflows or
    /// packed elements do not fill whole bytes.
    pub fn byte_len(self, shape: &[u64]) -> Option<u64> {
        // A zero anywhere makes the array empty, however large the rest is.
        if shape.contains(&0) {
            return Some(0);
        }
        let count = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d))?;
        let bits = u128::from(count) * u128::from(self.bits());
        if bits % 8 != 0 {
            return None;
        }
        u64::try_from(bits / 8).ok()
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_found_again() {
        for &d in Dtype::ALL {
            assert_eq!(Dtype::from_name(d.name()), Some(d));
        }
        assert_eq!(Dtype::from_name("object"), None);
    }

    #[test]
    fn descriptions_are_those_every_numpy_opens() {
        assert_eq!(Dtype::F32.npy_descr(false), "<f4");
        assert_eq!(Dtype::F32.npy_descr(true), ">f4");
        assert_eq!(Dtype::Bool.npy_descr(true), "|b1");
        assert_eq!(Dtype::Bf16.npy_descr(false), "<V2");
        assert_eq!(Dtype::F8E5m2.npy_descr(false), "|V1");
        assert_eq!(Dtype::C32.npy_descr(false), "|V4");
        assert_eq!(Dtype::C128.npy_descr(false), "<c16");
    }

    #[test]
    fn lengths_are_checked() {
        assert_eq!(Dtype::F32.byte_len(&[]), Some(4));
        assert_eq!(Dtype::F32.byte_len(&[0, u64::MAX, u64::MAX]), Some(0));
        assert_eq!(Dtype::F32.byte_len(&[1 << 40, 1 << 40]), None);
        assert_eq!(Dtype::F32.byte_len(&[u64::MAX]), None);
        assert_eq!(Dtype::F4E2m1fn.byte_len(&[3, 2]), Some(3));
        assert_eq!(Dtype::F4E2m1fn.byte_len(&[3]), None);
        assert_eq!(Dtype::F6E2m3fn.byte_len(&[4]), Some(3));
    }
}
